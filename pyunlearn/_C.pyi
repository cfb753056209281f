# The native module (csrc/bindings.cpp). Tensors are DLPack capsules or None.
from typing import Any

cuda_archs: str
cuda_reason: str
compiler: str
openmp: bool
state_fields: int

def instruction_set() -> str: ...
def choose_instruction_set(name: str) -> str: ...
def accumulate(logits: Any, targets: Any, reference: Any, state: Any, fresh: bool, *call: Any) -> None: ...
def finish(state: Any, targets: Any, has_reference: bool, stats: Any, saved: Any, *call: Any) -> None: ...
def topk(logits: Any, targets: Any, stats: Any, saved: Any, index: Any, belief: Any, *call: Any) -> None: ...
def backward(
    grad_stats: Any,
    stats: Any,
    saved: Any,
    logits: Any,
    targets: Any,
    reference: Any,
    index: Any,
    belief: Any,
    grad_logits: Any,
    *call: Any,
) -> None: ...
def parts(cuda_device: int, rows: int, columns: int) -> int: ...
def value_and_grad(
    rule: tuple[float, float, float],
    weights: Any,
    floor: Any,
    logits: Any,
    targets: Any,
    stats: Any,
    grad_logits: Any,
    *call: Any,
) -> bool: ...
def philox(counter: tuple[int, int, int, int], key: int) -> list[int]: ...
def perturb(
    table: Any,
    source: Any,
    target: Any,
    seed: int,
    remove: tuple[int, float] | None,
    add: tuple[int, float] | None,
    threads: int,
    stream: int,
) -> None: ...
def segment_dot(table: Any, chunk: int, partials: Any, sums: Any, threads: int, stream: int) -> None: ...
