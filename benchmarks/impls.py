"""The implementations: ours by backend, and the peers that are installed. Each takes a case and its fresh tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import pyunlearn as pu

from .cases import Case, Linear, Logits, straight

Run = Callable[[Any, dict], list[torch.Tensor]]


def finish(case: Case, t: dict, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, case.leaves(t)))


def ours(case: Case, t: dict, inplace: bool = False) -> list[torch.Tensor]:
    if isinstance(case, Linear):
        tensors = (t["hidden"], t["weight"], t["targets"])
        return finish(case, t, -pu.linear_token_stats(*tensors, budget_bytes=case.budget_bytes).logp.mean())
    stats = pu.token_stats(
        t["logits"], t["targets"], case.outputs, reference=t["reference"], inplace_backward=inplace
    ).as_dict()
    return finish(case, t, case.loss(t, stats)) if case.backward else list(stats.values())


def ours_inplace(case: Case, t: dict) -> list[torch.Tensor]:
    return ours(case, t, inplace=True)


def eager(case: Case, t: dict) -> list[torch.Tensor]:
    if isinstance(case, Linear):
        return finish(case, t, F.cross_entropy(F.linear(t["hidden"], t["weight"]), t["targets"]))
    with torch.set_grad_enabled(case.backward):
        stats = straight(t["logits"], t["targets"], t["reference"], case.outputs)
    return finish(case, t, case.loss(t, stats)) if case.backward else [stats[name] for name in case.outputs]


@functools.cache
def compile_for(name: str, dtype: torch.dtype) -> Callable[..., dict[str, torch.Tensor]]:
    torch._dynamo.reset()  # each case compiled on its own: nothing falls back for having been recompiled too often
    return torch.compile(straight, fullgraph=True)


def compiled(case: Logits, t: dict) -> list[torch.Tensor]:
    stats = compile_for(case.name, case.dtype)(t["logits"], t["targets"], t["reference"], case.outputs)
    return finish(case, t, case.loss(t, stats)) if case.backward else [stats[name] for name in case.outputs]


def torch_linear_cross_entropy(case: Linear, t: dict) -> list[torch.Tensor]:
    return finish(case, t, F.linear_cross_entropy(t["hidden"], t["weight"], t["targets"]))


def gemms_alone(case: Linear, t: dict) -> list[torch.Tensor]:
    """The three matrix products and nothing else: the floor. Its results are not the gradients."""
    hidden, weight = t["hidden"].detach(), t["weight"].detach()
    logits = hidden @ weight.t()
    return [logits @ weight, logits.t() @ hidden]


def implementations(case: Case) -> dict[str, Run]:
    """Name -> run, for this case and what is installed."""
    if isinstance(case, Linear):
        runs: dict[str, Run] = {"eager": eager, "cpu": ours}
        if hasattr(F, "linear_cross_entropy"):
            runs["torch linear_cross_entropy"] = torch_linear_cross_entropy
        runs["three GEMMs alone"] = gemms_alone
        return runs
    runs = {"eager": eager, "compile": compiled, "cpu": ours}
    if case.backward:
        runs["cpu in place"] = ours_inplace
    return runs
