"""What the Triton kernels compile to: no spills, the occupancy they count on, wide loads. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pyunlearn.triton_kernels.lanes import THREADS
from pyunlearn.triton_kernels.token_stats import RESIDENT

ROOT = Path(__file__).parent.parent.parent
KERNELS = ("accumulate_kernel", "finish_kernel", "topk_kernel", "backward_kernel", "tile_kernel")


def test_kernels_as_compiled_for_a_gpu(tmp_path):
    """For sm_80 and sm_90, in a process of its own: there triton does not interpret."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "compile_worker.py"), "80", "90"]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert worker.returncode == 0, worker.stderr
    report = json.loads(worker.stdout)
    assert {(one["kernel"], one["capability"]) for one in report} == {(k, c) for k in KERNELS for c in (80, 90)}
    for one in report:
        assert one["STACK"] == one["LOCAL"] == 0, f"spills: {one}"
        assert one["again"], f"compiled again for another shape or option: {one}"
        if one["kernel"] == "tile_kernel":
            check_tile(one)
        else:
            check_resources(one)
            check_width(one)


def check_resources(one):
    assert one["REG"] * THREADS.value * RESIDENT <= 65536, f"too few programs fit an SM: {one}"
    assert one["shared"] <= 4096, one


def check_width(one):
    """Rows of any width go by 16 bytes: the loads of the loop and those ahead of it, forward of two chunks, and
    backward's stores."""
    wide = {kind: sum(op.endswith((".v4.b32", ".v2.b64")) for op in one[kind]) for kind in ("loads", "stores")}
    vectors = one["flags"].get("BLOCK", 0) // THREADS.value // one["flags"].get("VEC", 1)
    if one["kernel"] == "finish_kernel":
        assert wide["loads"] == 0, one
    else:
        assert one["flags"]["WIDE"], one
        assert wide["loads"] >= (4 if one["kernel"] == "accumulate_kernel" else 2) * vectors > 0, one
        assert wide["stores"] >= (vectors if one["kernel"] == "backward_kernel" else 0), one


def check_tile(one):
    """On the tensor cores (float64: where triton and the GPU have them); shared memory is filled 16 bytes at a time."""
    assert one["products"] > 0 or one["dtype"] == "torch.float64", one
    assert one["copies"], one
    assert set(one["copies"]) <= {"0x10", "16"}, one
    assert one["shared"] <= 99 * 1024, one
    assert one["REG"] * 32 * one["warps"] <= 65536, one
