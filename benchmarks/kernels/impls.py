"""The implementations: ours by backend, plain PyTorch, and the peers. Each takes a case and its fresh tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import pyunlearn as pu
from pyunlearn.ops.memory import empty

from ..measure import can_keep_memory
from . import peers
from .cases import BEYOND, FROZEN, MEAN, Case, Impl, Linear, Logits, Product, fused, straight

KEPT = "freed memory kept"  # what is measured so
WRITE = "one write alone"


def ours(backend: str, inplace: bool = False) -> Impl:
    def run(case: Case, t: dict) -> list[torch.Tensor]:
        how: dict[str, Any]
        if isinstance(case, Linear):
            reference = (t["ref_hidden"], t["ref_weight"]) if case.kind.reference else None
            tensors, how = (t["hidden"], t["weight"], t["targets"]), {"reference": reference, "backend": backend}
            how |= {"budget_bytes": case.budget_bytes, "ignore_index": None}  # every target counts: nothing waits
            stats = pu.linear_token_stats(*tensors, outputs=case.kind.outputs, **how)
            return case.gradients(t, stats.as_dict())
        if case.kind.at_once:
            how = {"inplace": inplace, "backend": backend}
            stats, gradient = pu.value_and_grad(t["logits"].detach(), t["targets"], t["weights"], **how)
            return [gradient, stats.logp]
        how = {"reference": t["reference"], "inplace_backward": inplace, "backend": backend}
        values = pu.token_stats(t["logits"], t["targets"], case.kind.outputs, **how).as_dict()
        return case.gradients(t, values) if case.kind.backward else list(values.values())

    return Impl(run)


def ours_at_once(backend: str) -> Impl:
    """The weights are known beforehand: no logits are kept for a backward."""

    def run(case: Linear, t: dict) -> list[torch.Tensor]:
        weights = t["weights"] if case.kind.weighted else torch.full_like(t["weights"], -1 / case.n)
        reference = (t["ref_hidden"], t["ref_weight"]) if case.kind.reference else None
        how: dict[str, Any] = {"reference": reference, "ignore_index": None, "backend": backend}
        tensors = (t["hidden"], t["weight"], t["targets"], dict.fromkeys(case.kind.outputs, weights))
        _, gradients = pu.linear_value_and_grad(*tensors, **how)
        return [d for d in gradients[:2] if d is not None]

    return Impl(run)


def eager(case: Case, t: dict) -> list[torch.Tensor]:
    if isinstance(case, Linear):
        logits = F.linear(t["hidden"], t["weight"])
        if not case.kind.weighted:
            return list(torch.autograd.grad(F.cross_entropy(logits, t["targets"]), case.leaves(t)))
        reference = F.linear(t["ref_hidden"], t["ref_weight"]) if case.kind.reference else None
        return case.gradients(t, straight(logits, t["targets"], reference, case.kind.outputs))
    return of_logits(case, t, straight)


def compiled(case: Logits, t: dict) -> list[torch.Tensor]:
    return of_logits(case, t, compile_for(case.name, case.dtype, case.n, case.v))


def of_logits(case: Logits, t: dict, statistics: Callable[..., dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    stats = statistics(t["logits"], t["targets"], t["reference"], case.kind.outputs)
    if not case.kind.backward:
        return [stats[name] for name in case.kind.outputs]
    results = case.gradients(t, stats)
    return [*results, stats["logp"]] if case.kind.at_once else results


@functools.lru_cache(maxsize=1)
def compile_for(*key: object) -> Callable[..., dict[str, torch.Tensor]]:
    torch._dynamo.reset()  # each case compiled on its own: nothing falls back for having been recompiled too often
    return torch.compile(straight, fullgraph=True, dynamic=False)


def write(case: Logits, t: dict) -> list[torch.Tensor]:
    """What d(logits) out of place takes besides d(logits) in place."""
    return [empty((case.n, case.v), case.dtype, torch.device("cpu")).fill_(1)]


def torch_linear_cross_entropy(case: Linear, t: dict) -> list[torch.Tensor]:
    return list(torch.autograd.grad(F.linear_cross_entropy(t["hidden"], t["weight"], t["targets"]), case.leaves(t)))


def gemms_alone(case: Linear, t: dict) -> list[torch.Tensor]:
    """The matrix products and nothing else: the floor. Its results are not the gradients."""
    hidden, weight = t["hidden"].detach(), t["weight"].detach()
    logits = hidden @ weight.t()
    return [logits @ weight] if case.kind.frozen else [logits @ weight, logits.t() @ hidden]


def implementations(case: Case) -> dict[str, Impl]:
    """Name -> implementation, for this case and what is installed."""
    if isinstance(case, Product):
        return {"torch": Impl(lambda case, t: [t["a"] @ t["b"]])}
    if not isinstance(case, Linear | Logits):
        return case.implementations()
    names = fused(case.device)
    impls = {name: ours(name) for name in names}
    if isinstance(case, Linear):
        if case.kind.budget is None:
            impls |= {f"{name} at once": ours_at_once(name) for name in names}
        impls["eager"] = Impl(eager)
        if case.name in (MEAN, BEYOND, FROZEN) and hasattr(F, "linear_cross_entropy"):
            impls["torch linear_cross_entropy"] = Impl(torch_linear_cross_entropy)
        impls["two GEMMs alone" if case.kind.frozen else "three GEMMs alone"] = Impl(gemms_alone, exact=False)
    else:
        if case.kind.backward:
            impls |= {f"{name} in place": ours(name, inplace=True) for name in names}
            if case.device == "cpu":
                impls[WRITE] = Impl(write, exact=False, bytes=case.n * case.v * case.dtype.itemsize)
                if can_keep_memory():
                    impls |= {f"{name}, {KEPT}": ours(name) for name in names}
                    impls[f"{WRITE}, {KEPT}"] = impls[WRITE]
        impls |= {"eager": Impl(eager), "compile": Impl(compiled)}
    if case.device != "cpu":
        impls |= {name: Impl(*peer) for name, peer in peers.of(case).items()}
    return impls
