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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyunlearn.ops import OUTPUTS
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


class Driver:
    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


launched: list[tuple[str, dict[str, Any], Any]] = []
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


def usage(compiled: Any) -> dict[str, int]:
    """Of one thread: registers, bytes on the stack, where ptxas spills, and in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_function = report[report.index("Function") :]
    return {key: int(re.search(rf"\b{key}:(\d+)", of_function)[1]) for key in ("REG", "STACK", "LOCAL")}


def main() -> None:
    JITFunction.run = compile_only
    report = []
    for capability in map(int, sys.argv[1:]):
        driver.set_active(Driver(capability))
        for dtype, columns, options in CASES:
            launched.clear()
            steps(4, dtype, columns, options)
            first = list(launched)
            launched.clear()
            other = Options(options.outputs, options.temperature * 0.9 if options.temperature != 1 else 1.0,
                            options.softcap and options.softcap + 1, -1, options.k)  # fmt: skip
            steps(5, dtype, columns + 1024, other)  # other rows, width, temperature, ignored id: the same kernels
            for (name, flags, compiled), (_, _, again) in zip(first, launched, strict=True):
                report.append(
                    dict(
                        capability=capability, kernel=name, dtype=str(dtype), outputs=options.outputs,
                        softcap=options.softcap, again=again is compiled, shared=compiled.metadata.shared,
                        flags={key: value for key, value in flags.items() if key.isupper()}, **usage(compiled),
                        loads=re.findall(r"ld\.global[.\w:]*", compiled.asm["ptx"]),
                        stores=re.findall(r"st\.global[.\w:]*", compiled.asm["ptx"]),
                    )
                )  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
