"""Free memory: the machine's, or what a container's limit leaves of it."""

from __future__ import annotations

import pytest
import torch

from pyunlearn.ops import memory

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
