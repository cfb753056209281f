"""What would be wrong on a GPU is shown where the CUDA kernels run on the CPU (faults.cu has the kernels)."""

import subprocess

from . import HERE, poisoned


def test_declarations_are_followed_by_nan():
    fill = [f" cuda_on_cpu::poison({name});" for name in "abc"]
    two, one = "__shared__ int a[2][256], b[kWarps];", "__shared__ RowState<float> c;"
    assert poisoned(f"{two}\n  {one}") == f"{two}{fill[0]}{fill[1]}\n  {one}{fill[2]}"
    dynamic = "extern __shared__ __align__(16) unsigned char name[]"
    assert poisoned(dynamic) == dynamic


def test_faults_are_told(tmp_path):
    program = tmp_path / "faults"
    command = ["g++", "-std=c++17", "-O1", "-pthread", f"-I{HERE}/include", "-x", "c++", "-", "-o", str(program)]
    subprocess.run(command, input=poisoned((HERE / "faults.cu").read_text()), text=True, check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for name in ("unwritten", "unwritten again"):
        assert told.pop(name) in ("3 nan 0 0", "3 -nan 0 0")
    assert told.pop("of an ended thread") in ("nan 0 0 0", "-nan 0 0 0")
    assert told.pop("two barriers").startswith("threads meet at different lines, ")
    arrivals = "at the cluster's barrier without"
    assert told.pop("waits alone").startswith(f"a wait {arrivals} an arrival, line ")
    assert told.pop("arrives twice").startswith(f"two arrivals {arrivals} a wait, line ")
    assert told.pop("one block fails").startswith(f"a wait {arrivals} an arrival, line ")
    assert told.pop("copies") in ("1.5 nan 4 0", "1.5 -nan 4 0")
    assert told == {
        "copies unprepared": "a copy whose arrival was not prepared (block 0, 0)",
        "copies odd bytes": "a copy of no whole 16 bytes (block 0, 0)",
        "waits for no copy": "threads wait for each other at different barriers",
        "half a warp": "threads wait for each other at different barriers",
        "arrives alone": "a thread ends between arriving at the cluster's barrier and waiting there (block 0, 0)",
        "exchanges": "10 10 10 10",
        "tall grid": "the grid is beyond a GPU's",
        "empty grid": "the grid is beyond a GPU's",
        "large cluster": "the cluster is none of a GPU's",
        "odd cluster": "the cluster is none of a GPU's",
        "shared": "more dynamic shared memory than the kernel was let have",
        "shared allowed": "0 0 0 0",
    }
