"""Rows that break naive kernels, the float64 oracle, and the error budget every backend is held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS

DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in ("variance", "greedy"))
KINDS = ("random", "peaked", "saturated", "uniform", "offset", "masked", "wrong")


def rows(kind: str, n: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, reference, targets) in float32."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=g) * 3
    targets = torch.randint(0, v, (n,), generator=g)
    lane = torch.arange(n)
    if kind == "peaked":  # entropy around 1e-5: one lane far above the rest, not always the target
        logits = logits / 10
        logits[lane, (targets + lane % 2) % v] += 22
    elif kind == "saturated":  # memorised: target margins from 16 to 100
        logits[lane, targets] = logits.amax(-1) + torch.linspace(16, 100, n)
    elif kind == "uniform":
        logits = logits * 1e-4
    elif kind == "offset":
        logits = logits + torch.tensor([300.0, -300.0, 3000.0, -3000.0]).repeat(n)[:n, None]
    elif kind == "wrong":  # the target far below
        logits[lane, targets] -= 60
    reference = logits + torch.randn(n, v, generator=g) * 0.3
    if kind == "masked" and v > 3:
        dead = torch.rand(n, v, generator=g) < 0.3
        dead[lane, targets] = False
        logits, reference = (
            logits.masked_fill(dead, float("-inf")),
            reference.masked_fill(dead, float("-inf")),
        )
    return logits, reference, targets


def device_of(backend: str | None) -> str:
    """Where a backend's tensors live in these tests: on the GPU where there is one, but for the CPU's own."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def skip_unless_taken(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels take no float64: test_float64_is_refused")


def interpreted(backend: str) -> bool:
    """Whether a backend runs in Python here: what is slow there shrinks, but never the kinds of rows."""
    return backend == "triton" and device_of(backend) == "cpu"


def upstreams_of(names: tuple[str, ...], n: int, backend: str) -> list[dict[str, Tensor]]:
    """Random gradients: each output alone, then all that are finite together. Interpreted, an output alone a row."""
    rest = {name: torch.randn(n, dtype=torch.float64) for name in names if name != "log_nll"}
    if interpreted(backend):
        own = torch.eye(len(names), dtype=torch.float64).repeat(1, n)[:, :n] * torch.randn(n, dtype=torch.float64)
        return [dict(zip(names, own, strict=True)), rest]
    return [*({name: torch.randn(n, dtype=torch.float64)} for name in names), rest]


def runs(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    upstreams: list[dict[str, Tensor]],
    outputs=OUTPUTS,
    backend: str | None = None,
    **options,
):
    """Statistics and, for each upstream, d(logits) of sum(upstream * statistic): computed on the backend's device,
    given back on the CPU as float64."""
    device = device_of(backend)
    x = logits.detach().to(device).requires_grad_()
    reference = None if reference is None else reference.to(device)
    stats = pu.token_stats(x, targets.to(device), outputs, reference=reference, backend=backend, **options).as_dict()
    grads = []
    for upstream in upstreams:
        terms = [(stats[name].double() * up.to(device)).sum() for name, up in upstream.items()]
        grad = torch.autograd.grad(sum(terms), x, retain_graph=True)[0] if terms else torch.zeros_like(x)
        grads.append(grad.double().cpu())
    return {name: value.detach().double().cpu() for name, value in stats.items()}, grads


def run(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    upstream: dict[str, Tensor],
    outputs=OUTPUTS,
    backend: str | None = None,
    **options,
):
    """`runs` for one upstream."""
    stats, (grad,) = runs(logits, targets, reference, [upstream], outputs, backend, **options)
    return stats, grad


def assert_within_budget(ours: Tensor, eager: Tensor, oracle: Tensor, tol: float, what: str) -> None:
    """|ours - fp64| <= |eager - fp64| + tol * scale at every element; equal where fp64 is not finite.

    The scale is the value itself, but not below what float32 can mean: KL is a difference of sums of order 1, the rest
    is held to 1e-3 nats (entropy of a peaked row included).
    """
    finite = oracle.isfinite()
    odd = ~finite
    same = (ours[odd] == oracle[odd]) | (ours[odd].isnan() & oracle[odd].isnan())
    assert bool(same.all()), f"{what}: {ours[odd]} where fp64 has {oracle[odd]}"
    mine = torch.where(finite, (ours - oracle).abs(), 0.0)
    theirs = torch.where(finite & eager.isfinite(), (eager - oracle).abs(), float("inf"))
    theirs = torch.where(finite, theirs, 0.0)
    scale = torch.where(finite, oracle.abs(), 0.0)
    excess = mine - theirs - tol * (scale + (1.0 if what.startswith(("kl", "d", "grad")) else 1e-3))
    worst = tuple(int(i) for i in (excess == excess.max()).nonzero()[0]) if excess.numel() else ()
    assert bool((excess <= 0).all()), (
        f"{what}: at {worst} error {mine[worst]} against eager's {theirs[worst]}, scale {scale[worst]}"
    )
