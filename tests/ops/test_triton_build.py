"""What the Triton kernels compile to: no spills, the occupancy they count on, wide loads. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WIDE = (".v4.b32", ".v2.b64")  # 16 bytes


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Every kernel for sm_80, sm_90 and sm_100, compiled in a process in which triton does not interpret."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    command = [sys.executable, str(Path(__file__).parent / "compile_worker.py"), "80", "90", "100"]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert worker.returncode == 0, worker.stderr
    return json.loads(worker.stdout)


def test_kernels_do_not_spill_and_fit_their_occupancy(report):
    from pyunlearn.triton_kernels.token_stats import RESIDENT, RESIDENT_SLOW, WARPS

    assert {(one["kernel"], one["capability"]) for one in report} == {
        (f"{name}_kernel", capability)
        for name in ("accumulate", "finish", "topk", "backward")
        for capability in (80, 90, 100)
    }
    for one in report:
        assert one["STACK"] == one["LOCAL"] == 0, one
        slow = one["softcap"] or one["dtype"] == "torch.float64"
        assert one["REG"] * 32 * WARPS * (RESIDENT_SLOW if slow else RESIDENT) <= 65536, one
        assert one["shared"] <= 4096, one


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(report):
    """At least the loads of the loop and those ahead of it, one set for the logits and one for the reference."""
    from pyunlearn.triton_kernels.token_stats import BYTES, WARPS

    seen = 0
    for one in report:
        wide_loads = sum(load.endswith(WIDE) for load in one["loads"])
        wide_stores = sum(store.endswith(WIDE) for store in one["stores"])
        if not one["flags"].get("ALIGNED"):
            assert wide_loads == 0, one
        elif one["kernel"] == "topk_kernel":
            assert wide_loads >= BYTES // 16, one
        else:  # a thread has BYTES in hand and BYTES on their way, of one tensor or of two
            assert wide_loads >= 2 * BYTES // 16, one
            lanes = one["flags"]["BLOCK"] // (32 * WARPS)
            vectors = lanes // one["flags"]["VEC"]
            assert wide_stores >= (vectors if one["kernel"] == "backward_kernel" else 0), one
            seen += 1
    assert seen >= 3 * 2 * 7


def test_shapes_and_options_compile_nothing_again(report):
    assert report
    assert all(one["again"] for one in report)
