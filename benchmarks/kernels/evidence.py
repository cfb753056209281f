"""What is known of the GPU kernels without running them: the compiler's report, what their hot loops cost by the
machine code, and the bytes each case must move.

Writes not-run-on-a-gpu-yet.md. Needs nvcc. Nothing in it is a measurement.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from pyunlearn.ops import OuterSum, backends
from pyunlearn.ops.contract import Options

from ..measure import ROOT, commit, output_of, versions
from ..results import read
from .cases import KINDS, Logits
from .disassembly import Instruction, Loop, functions, hot_loop
from .plans import VOCABULARIES

PAGE = "not-run-on-a-gpu-yet.md"
ARCHS = ("80", "90a", "100")
BANDWIDTH = {"A100 80 GB": 2.04, "H200": 4.8, "B200": 8.0}  # TB/s, by the vendor's datasheets
PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<used>[^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """One line of ptxas' report. Bytes; `shared` is static shared memory. loop: of sm_90a, where cuobjdump is."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    shared: int
    loop: Loop | None = None


def write(folder: Path) -> Path:
    """Compiles csrc/cuda for every architecture this nvcc knows and writes the page into `folder`."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("evidence: needs nvcc, whose report it is, and none is on the PATH; install the CUDA toolkit")
    archs = known_archs(nvcc)
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    kernels = [kernel for source in sources for kernel in compiled(nvcc, source, archs)]
    if importlib.util.find_spec("triton"):
        kernels += triton_kernels(archs)
    compilers = f"{version_of(nvcc)}, triton {versions().get('triton', 'not installed')}, commit {commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text("\n".join(markdown(kernels, devices_of(folder), compilers)) + "\n")
    print(f"wrote {page}")
    return page


def version_of(nvcc: str) -> str:
    return "nvcc " + re.findall(r"release [\d.]+, (V[\d.]+)", output_of(nvcc, "--version"))[0]


def known_archs(nvcc: str) -> list[str]:
    known = output_of(nvcc, "--list-gpu-arch").split()
    return [arch for arch in ARCHS if f"compute_{arch.rstrip('a')}" in known]


def compiled(nvcc: str, source: Path, archs: list[str]) -> list[Kernel]:
    """ptxas' report on every kernel of a file, for each architecture. Raises RuntimeError if it does not compile."""
    flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v", "--threads=2"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile: {done.stderr[-2000:]}")
        return parse(done.stderr, source.name, functions(Path(folder) / "kernels.o"))


def triton_kernels(archs: list[str]) -> list[Kernel]:
    """ptxas' report on the Triton kernels as their launchers compile them: token statistics with a reference and
    without, with a softcap, and the top k, and tiles of ghost_dot, each in bfloat16 and float32."""
    backend = backends.kernels("triton")
    calls: list[tuple[str, str, Callable[[], object]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        label = str(dtype)[6:]
        for outputs in (("logp",), ("logp", "entropy"), ("logp", "kl_pq"), ("topk",)):
            alone = partial(call_all, backend, dtype, outputs)
            calls.append(("token_stats.py", f"{label}, {' + '.join(outputs)}", alone))
        capped = partial(call_all, backend, dtype, ("logp",), softcap=30.0)
        calls.append(("token_stats.py", f"{label}, softcap", capped))
        u = OuterSum(torch.zeros(2, 512, 128, dtype=dtype), torch.zeros(2, 512, 128, dtype=dtype))
        calls.append(("ghost.py", label, partial(backend.ghost_dot, u, None)))
    kernels: list[Kernel] = []
    for arch in archs:
        built: dict[str, tuple[Any, str, str]] = {}
        for source, label, call in calls:
            with compiling(int(arch.rstrip("a"))) as launched:
                call()
            for kernel in launched:
                built.setdefault(kernel.hash, (kernel, source, label))
        for kernel, source, label in built.values():
            name = f"{kernel.metadata.name}<{label}>"
            kernels += assembled(
                kernel.asm["ptx"], name, arch, kernel.metadata.shared, source, kernel.metadata.num_warps
            )
    return kernels


@contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Triton launches inside compile for sm_`arch` and stop there; the compiled kernels are listed. A driver that only
    names a target takes the GPU's place."""
    import triton
    from triton.backends.compiler import GPUTarget

    function, driver, kernels = triton.runtime.JITFunction, triton.runtime.driver, []
    run, active = function.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    named = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # compiled code is kept by device
        get_current_stream=lambda device: 0,
    )
    function.run, driver._active = compile_only, named
    try:
        yield kernels
    finally:
        function.run, driver._active = run, active


def call_all(backend: ModuleType, dtype: torch.dtype, outputs: tuple[str, ...], softcap: float = 0.0) -> None:
    """Every kernel of a fused backend once."""
    options, reference, rows, columns = Options(outputs, softcap=softcap), "kl_pq" in outputs, 4, 4096
    logits, targets = torch.randn(rows, columns).to(dtype), torch.zeros(rows, dtype=torch.int64)
    ref = logits.clone() if reference else None
    state = backend.new_state(logits, rows, columns)
    backend.accumulate(logits, targets, ref, state, options, 0, columns, True)
    stats, saved = backend.finish(state, targets, reference, options, columns)
    index, belief = backend.topk(logits, targets, stats, saved, options)
    backend.backward(stats, stats, saved, logits, targets, ref, index, belief, options, torch.empty_like(logits))


def assembled(ptx: str, name: str, arch: str, shared: int, source: str, warps: int = 4) -> list[Kernel]:
    """Triton's own ptxas on its own code; shared memory is given at launch."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(int(arch.rstrip("a"))).path, "-v", f"--gpu-name={target}", str(file)]
        command += ["-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = functions(Path(folder) / "kernel.cubin") if arch == "90a" else {}
    (kernel,) = parse(report, source)
    loop = loop_of(name, kernel.registers, code.popitem()[1], 32 * warps) if code else None
    return [kernel._replace(name=name, arch=f"sm_{arch}", shared=shared, loop=loop)]


def loop_of(name: str, registers: int, code: list[Instruction], threads: int = 256) -> Loop | None:
    """The hot loop of a kernel that reads rows of logits; its name says what it reads and takes of an element."""
    found = re.match(r"(accumulate|backward|value_and_grad|topk)_kernel<(\w+), (.+)>", name)
    if found is None:
        return None
    dtype, flags = found[2], found[3].split(", ")
    sums = re.fullmatch(r"(\d+)u", flags[0])
    reference = bool(int(sums[1]) & 8) if sums else flags[1:2] == ["true"] or flags[-1].endswith("kl_pq")
    rows, curve = 1 + reference, 2 * (flags[-1] in ("true", "softcap"))  # with a softcap: e^2x and a quotient more
    item = 4 if dtype in ("float", "float32") else 2
    return hot_loop(code, registers, threads, item, rows, 0 if found[1] == "topk" else rows * (1 + curve))


def parse(report: str, source: str, code: dict[str, list[Instruction]] = {}) -> list[Kernel]:  # noqa: B006
    entries = [match.groupdict() for match in PTXAS.finditer(report)]
    mangled = list(dict.fromkeys(entry["kernel"] for entry in entries))
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    names = dict(zip(mangled, output_of(filt, *mangled).splitlines() if filt and mangled else mangled, strict=True))
    kernels = []
    for entry in entries:
        name, arch, registers = plain_name(names[entry["kernel"]]), f"sm_{entry['arch']}", int(entry["registers"])
        stack, spilled = int(entry["stack"]), int(entry["stores"]) + int(entry["loads"])
        shared = int((re.findall(r"(\d+) bytes smem", entry["used"]) or ["0"])[0])
        known = arch == "sm_90a" and entry["kernel"] in code
        loop = loop_of(name, registers, code[entry["kernel"]]) if known else None
        kernels.append(Kernel(source, name, arch, registers, stack, spilled, shared, loop))
    return kernels


def plain_name(demangled: str) -> str:
    """Without namespaces, return type and arguments: accumulate_kernel<float, true, false>."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\(bool\)|\(int\)|pu::cuda::", "", demangled)
    match = re.search(r"(\w+)(<.*?>)?\(", name)
    return match.group(1) + (match.group(2) or "") if match else name


def devices_of(folder: Path) -> dict[str, list[str]]:
    """Backend -> devices on which records of it are stored."""
    devices: dict[str, list[str]] = {"cuda": [], "triton": []}
    for path in sorted(folder.glob("*/*.json")):
        for record in read(path) if path.stem in ("logits", "linear", "weights") else []:
            backend = record["impl"].split()[0]
            if backend in devices and record["time_ms"] and record["device"] not in devices[backend]:
                devices[backend].append(record["device"])
    return devices


def markdown(kernels: Iterable[Kernel], devices: dict[str, list[str]], compiler: str) -> list[str]:
    kernels = sorted(kernels, key=lambda kernel: ARCHS.index(kernel.arch[3:]))  # nvcc's threads report as they end
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    lines = ["# GPU kernels: what is known without running them", ""]
    for backend, names in devices.items():
        state = f"measured on {', '.join(names)}" if names else "not run on a GPU yet"
        lines.append(f"- backend `{backend}`: {state}")
    lines += [
        "",
        f"Generated by `python -m benchmarks evidence`; {compiler}. Nothing on this page is a measurement.",
        "",
        "## The compiler's report",
        "",
        "Registers a thread; spills, stack and static shared memory in bytes (value_and_grad takes its row on top).",
        f"In this order: {', '.join(archs)}; one figure where all agree.",
        "",
        "| source | kernel | registers | spills | stack | shared |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((kernel.source, kernel.name) for kernel in kernels):
        same = {kernel.arch: kernel for kernel in kernels if (kernel.source, kernel.name) == key}
        cells = [joined([getattr(kernel, field) for kernel in same.values()]) for field in Kernel._fields[3:7]]
        registers, stack, spilled, shared = cells
        lines.append(f"| {key[0]} | `{key[1]}` | {registers} | {spilled} | {stack} | {shared} |")
    lines += [*hot_loops(kernels)]
    chips = [f"{chip} ({rate} TB/s)" for chip, rate in BANDWIDTH.items()]
    lines += [
        "",
        "## The least traffic",
        "",
        "Bytes a case must move (bfloat16, N=8192), and the time in ms no kernel can beat at the memory bandwidth of",
        "the vendor's datasheet: limits, not measurements.",
        "",
    ]
    lines += [f"| case | V | GB | {' | '.join(chips)} |", "|---|---|---|" + "---|" * len(chips)]
    for name in KINDS:
        for v in VOCABULARIES:
            size = Logits(name, torch.bfloat16, 8192, v).bytes
            limits = [f"{size / rate / 1e9:.3f}" for rate in BANDWIDTH.values()]
            lines.append(f"| {name} | {v} | {size / 1e9:.2f} | {' | '.join(limits)} |")
    return lines


def hot_loops(kernels: list[Kernel]) -> Iterator[str]:
    yield from (
        "",
        "## The hot loops",
        "",
        "Read off the machine code for sm_90a: instructions (issue slots) and special functions an element of the",
        "logits (of a pair, with a reference), bytes of the widest load, and bytes that a loop's round loads on an SM",
        "with as many threads as the registers let be there. An SM issues four instructions a cycle: 132 of them, at",
        "1.755 to 1.98 GHz, have 13.8 to 15.6 slots for every two bytes at 4.3 TB/s. value_and_grad loads from shared",
        "memory, to which its whole row was on the way at once.",
        "",
        "| source | kernel | slots | special | load | in flight |",
        "|---|---|---|---|---|---|",
    )
    for kernel in kernels:
        if loop := kernel.loop:
            figures = f"{loop.slots:.2f} | {loop.special:.2f} | {loop.width} | {loop.flight}"
            yield f"| {kernel.source} | `{kernel.name}` | {figures} |"


def loops_of(page: str) -> dict[tuple[str, str], Loop]:
    """What a page has of the hot loops, by source and kernel."""
    rows = re.findall(r"^\| (\S+) \| `(.+)` \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    return {(row[0], row[1]): Loop(float(row[2]), float(row[3]), int(row[4]), int(row[5])) for row in rows}


def grown(kernels: Iterable[Kernel], page: str) -> list[str]:
    """What is worse than on a page: more slots or special functions, narrower loads, less in flight."""
    known, told = loops_of(page), []
    for kernel in kernels:
        if (loop := kernel.loop) is None:
            continue
        before = known.get((kernel.source, kernel.name))
        if before is None:
            told.append(f"{kernel.name} is not on the page")
        elif (
            loop.slots > before.slots + 0.01
            or loop.special > before.special + 0.01
            or loop.width < before.width
            or loop.flight < before.flight
        ):
            told.append(f"{kernel.name}: {loop}, was {before}")
    return told


def joined(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))
