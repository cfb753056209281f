"""Run by test_triton_build.py: the launcher's own calls compile every Triton kernel for GPUs that need not be here.

A stand-in for triton's driver names the GPU, and launches end after compiling. Prints a JSON list with one entry a
compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyunlearn.ops import OUTPUTS, OuterSum
from pyunlearn.ops.backends import kernels
from pyunlearn.ops.contract import Options

ALL = OUTPUTS
PLAIN = tuple(name for name in OUTPUTS if not name.startswith("kl"))
CASES: list[tuple[torch.dtype, int, Options]] = [  # dtype, columns, options
    (torch.bfloat16, 512, Options(("logp",))),
    (torch.bfloat16, 512, Options(("logp", "entropy"))),
    (torch.bfloat16, 512, Options(("logp", "kl_pq"))),
    (torch.bfloat16, 512, Options(ALL)),
    (torch.bfloat16, 512, Options(PLAIN, softcap=30.0)),
    (torch.bfloat16, 511, Options(ALL, temperature=0.7, softcap=30.0, k=256)),
    (torch.float16, 512, Options(ALL)),
    (torch.float32, 512, Options(ALL, temperature=0.7)),
    (torch.float64, 512, Options(ALL, softcap=30.0, k=256)),
]
GHOSTS = [  # dtype, positions, whether u's left and v's are one-hot; v None: u itself
    (torch.bfloat16, 100, (False, None)),
    (torch.bfloat16, 300, (False, None)),
    (torch.bfloat16, 300, (True, False)),
    (torch.float16, 300, (True, None)),
    (torch.float32, 300, (False, None)),
    (torch.float32, 300, (True, False)),
    (torch.float64, 300, (False, None)),
]


class Driver:
    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


Launch = tuple[str, dict[str, Any], Any]  # kernel, options, what it was compiled to
launched: list[Launch] = []
run = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    launched.append((self.fn.__name__, options, compiled))
    return compiled


def steps(rows: int, dtype: torch.dtype, columns: int, options: Options) -> None:
    """A forward and a backward, as the op launches them."""
    backend = kernels("triton")
    logits, targets = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    reference = logits if "kl_pq" in options.outputs else None
    state = backend.new_state(logits, rows, columns)
    backend.accumulate(logits, targets, reference, state, options, 0, columns, True)
    stats, saved = backend.finish(state, targets, reference is not None, options, columns)
    index, belief = backend.topk(logits, targets, stats, saved, options)
    backend.backward(stats, stats, saved, logits, targets, reference, index, belief, options, torch.empty_like(logits))


def ghosts(dtype: torch.dtype, length: int, one_hot: tuple[bool, bool | None], columns: int = 128) -> None:
    sides = [
        OuterSum(
            torch.zeros(2, length, dtype=torch.int64) if ids else torch.zeros(2, length, columns, dtype=dtype),
            torch.zeros(2, length, columns, dtype=dtype),
        )
        for ids in one_hot if ids is not None
    ]  # fmt: skip
    kernels("triton").ghost_dot(*sides, *[None] * (2 - len(sides)))


def usage(compiled: Any) -> dict[str, int]:
    """Of one thread: registers, bytes on the stack, where ptxas spills, and in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_function = report[report.index("Function") :]
    return {key: int(re.search(rf"\b{key}:(\d+)", of_function)[1]) for key in ("REG", "STACK", "LOCAL")}


def both(first: Callable[[], None], other: Callable[[], None]) -> list[tuple[Launch, Launch]]:
    """The launches of two calls that should take the same kernels."""
    calls = []
    for call in (first, other):
        launched.clear()
        call()
        calls.append(list(launched))
    return list(zip(*calls, strict=True))


def report_of(one: Launch, again: Launch) -> dict[str, Any]:
    name, flags, compiled = one
    return dict(
        kernel=name, again=again[2] is compiled, shared=compiled.metadata.shared, warps=compiled.metadata.num_warps,
        flags={key: value for key, value in flags.items() if key.isupper()}, **usage(compiled),
        loads=re.findall(r"ld\.global[.\w:]*", compiled.asm["ptx"]),
        stores=re.findall(r"st\.global[.\w:]*", compiled.asm["ptx"]),
        copies=re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", compiled.asm["ptx"]),
        products=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", compiled.asm["ptx"])),
    )  # fmt: skip


def main() -> None:
    JITFunction.run = compile_only
    report = []
    for capability in map(int, sys.argv[1:]):
        driver.set_active(Driver(capability))
        for dtype, columns, options in CASES:
            other = Options(options.outputs, options.temperature * 0.9 if options.temperature != 1 else 1.0,
                            options.softcap and options.softcap + 1, -1, options.k)  # fmt: skip
            for one, again in both(
                lambda: steps(4, dtype, columns, options),  # noqa: B023
                lambda: steps(5, dtype, columns + 1024, other),  # noqa: B023  # another width, temperature, ignored id
            ):
                softcap = options.softcap
                report.append(
                    {"dtype": str(dtype), "softcap": softcap, "capability": capability, **report_of(one, again)}
                )
        for dtype, length, one_hot in GHOSTS:
            for one, again in both(
                lambda: ghosts(dtype, length, one_hot),  # noqa: B023
                lambda: ghosts(dtype, length + 100, one_hot, 256),  # noqa: B023
            ):
                report.append({"dtype": str(dtype), "capability": capability, **report_of(one, again)})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
