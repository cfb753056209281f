# The native module (csrc/bindings.cpp). Tensors are DLPack capsules or None.
from typing import Any

cuda_archs: str
cuda_reason: str
compiler: str
openmp: bool
state_fields: int

def instruction_set() -> str: ...
def choose_instruction_set(name: str) -> str: ...

class Call:
    def __init__(
        self,
        *,
        outputs: int,
        temperature: float,
        softcap: float,
        ignore_index: int,
        first_column: int,
        vocabulary: int,
        threads: int,
        stream: int,
    ) -> None: ...

def parts(cuda_device: int, rows: int, columns: int) -> int: ...
def accumulate(call: Call, *, logits: Any, targets: Any, reference: Any, state: Any, fresh: bool) -> None: ...
def finish(call: Call, *, state: Any, targets: Any, has_reference: bool, stats: Any, saved: Any) -> None: ...
def topk(call: Call, *, logits: Any, targets: Any, stats: Any, saved: Any, index: Any, belief: Any) -> None: ...
def backward(
    call: Call,
    *,
    grad_stats: Any,
    stats: Any,
    saved: Any,
    logits: Any,
    targets: Any,
    reference: Any,
    index: Any,
    belief: Any,
    grad_logits: Any,
) -> None: ...
def value_and_grad(
    call: Call,
    *,
    logits: Any,
    targets: Any,
    weights: Any,
    alpha: float,
    gamma: float,
    beta: float,
    floor: Any,
    stats: Any,
    grad_logits: Any,
) -> str | None: ...
def philox(counter: tuple[int, int, int, int], key: int) -> list[int]: ...
def perturb(
    *,
    table: Any,
    source: Any,
    target: Any,
    seed: int,
    remove: tuple[int, float] | None,
    add: tuple[int, float] | None,
    threads: int,
    stream: int,
) -> None: ...
def segment_dot(*, table: Any, chunk: int, partials: Any, sums: Any, threads: int, stream: int) -> None: ...
