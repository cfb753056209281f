"""Free memory: the machine's, or what a container's limit leaves of it; and huge pages for fresh outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import pyunlearn as pu
from pyunlearn.ops import memory
from pyunlearn.ops.projection import Projection

MB = 1 << 20


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_takes_the_tightest_of_the_groups_above(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/user/job\n")
    write(tmp_path / "cg/user/job", memory__max="max\n", memory__current=f"{900 * MB}\n", memory__stat="anon 1\n")
    assert memory.free_in_container(tmp_path / "cg", own) == 1 << 62
    stat = f"anon 5\ninactive_file {100 * MB}\n"
    write(tmp_path / "cg/user", memory__max=f"{1600 * MB}\n", memory__current=f"{1000 * MB}\n", memory__stat=stat)
    assert memory.free_in_container(tmp_path / "cg", own) == 700 * MB


def test_a_container_that_sees_itself_as_the_root(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/somewhere/outside\n")
    write(tmp_path / "cg", memory__max=f"{500 * MB}", memory__current=f"{600 * MB}", memory__stat="")
    assert memory.free_in_container(tmp_path / "cg", own) == 0


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_version_1(path, tmp_path):
    own = tmp_path / "own"
    own.write_text(f"5:cpu,cpuacct:/x\n4:memory:{path}\n")
    stat = f"inactive_file 7\ntotal_inactive_file {10 * MB}\n"
    write(
        tmp_path / "cg/memory",
        memory__limit_in_bytes=str(300 * MB),
        memory__usage_in_bytes=str(200 * MB),
        memory__stat=stat,
    )
    assert memory.free_in_container(tmp_path / "cg", own) == 110 * MB


def test_without_control_groups_the_machine_counts(tmp_path, monkeypatch):
    assert memory.free_in_container(tmp_path / "none", tmp_path / "neither") == 1 << 62
    monkeypatch.setattr(memory, "free_in_machine", lambda: 50 * MB)
    monkeypatch.setattr(memory, "free_in_container", lambda: 40 * MB)
    assert memory.free_bytes(torch.device("cpu")) == 40 * MB


# ---- huge pages ------------------------------------------------------------------------------------------------------


def flags_at(address: int) -> list[str]:
    """What the kernel notes of the mapping around `address`; hg: asked to be in huge pages."""
    around = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            around = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif around and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is at {address:#x}")


def gradient() -> torch.Tensor:
    logits = torch.randn(64, 1 << 15, requires_grad=True)
    return torch.autograd.grad(pu.token_stats(logits, torch.arange(64)).logp.sum(), logits)[0]


def gradient_at_once() -> torch.Tensor:
    return pu.value_and_grad(torch.randn(64, 1 << 15), torch.arange(64), {"logp": torch.ones(64)})[1]


def logits_of_a_head(dtype: torch.dtype) -> torch.Tensor:
    """Of one in bfloat16."""
    head = Projection.of(None, torch.randn(64, 8).bfloat16(), torch.randn(1 << 16, 8).bfloat16())
    with torch.no_grad():
        logits = head.logits(slice(None), dtype)
    right = head.inputs[0].float() @ head.weights[0].float().t()
    torch.testing.assert_close(logits.float(), right, atol=0.05, rtol=0.01)
    return logits


def scratch() -> torch.Tensor:
    model = nn.Linear(2048, 1024)
    with pu.perturbed(model, sigma=1e-5, seed=0, draw=0, mode="overlay"):
        return model.weight.data


FRESH = {
    "gradient": gradient,
    "gradient at once": gradient_at_once,
    "head": lambda: logits_of_a_head(torch.bfloat16),
    "head in float32": lambda: logits_of_a_head(torch.float32),
    "overlay": scratch,
}


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
@pytest.mark.parametrize("make", FRESH.values(), ids=FRESH)
def test_large_fresh_outputs_ask_for_huge_pages(make):
    plain, fresh = torch.empty(64 << 20, dtype=torch.uint8), make()
    assert "hg" in flags_at(fresh.data_ptr() + fresh.nbytes // 2)
    assert "hg" not in flags_at(plain.data_ptr() + plain.nbytes // 2)
