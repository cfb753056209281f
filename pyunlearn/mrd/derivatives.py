"""The leading orders of MRD in sigma, without perturbing: S(sigma z) = -sigma g.z - sigma^2 z'Mz / 2 + ...

g = grad sum_t log L_t: one backward, its norm sample by sample by ghost norms. M = sum_t Hess(L_t) / L_t: z'Mz of every
sample by two directional derivatives on top of each other (forward over forward), for the z that `perturbed` adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .._declined import decline
from ..gradients.per_sample import PerSample, SquaredNorms
from ..model.causal_lm import CausalLM
from ..model.forward import IGNORE_INDEX, supervised_hidden, supervised_logits
from ..ops import gaussian_noise, perturbed, token_stats
from .work import Estimate, Job, check_finite, second_order

HEAD_ELEMENTS = 1 << 24  # logits held at once, at most


def gradient(job: Job, sigma: float) -> Estimate:
    """sigma sqrt(2 / pi) ||g||, the leading order of E |S|."""
    samples = job.samples
    units = {j: f"batch-{j:06d}" for j in job.processes.share(range(len(samples.batches)))}
    half = any(p.dtype.itemsize < 4 for p in job.lm.given.parameters())
    shown = perturbed(job.lm.given, draw=None, mode="overlay") if half else nullcontext()  # float32 inside
    with shown, PerSample(job.lm.given, [weight.name for weight in job.weights]) as tap:
        finished = job.finish(units, lambda j: squared_norms(job, tap, samples.batches[j]), "mrd gradient")
    squared = torch.zeros(len(samples), dtype=torch.float64)
    for j, values in finished.items():
        squared[samples.members[j]] = values
    slope = job.processes.combine(squared).sqrt()
    check_finite(slope, "in its gradient")
    value = sigma * math.sqrt(2 / math.pi) * slope
    declined = decline_all(
        {
            "shared prefix": "estimator='gradient' differentiates whole samples",
            "fused head": "ghost norms see the head as a layer only, so each batch's logits are made whole",
        }
    )
    if tap.declined is not None:
        declined["one backward a batch"] = tap.declined  # the tap has logged it
    return Estimate(value, torch.zeros_like(slope), slope, diagnostics={"declined": declined})


def decline_all(reasons: Mapping[str, str]) -> dict[str, str]:
    """Optimisation -> why it is not used, each logged once."""
    return {optimisation: decline(optimisation, reason) for optimisation, reason in reasons.items()}


def squared_norms(job: Job, tap: PerSample, batch: Mapping[str, Tensor]) -> Tensor:
    """(B,) float64 on the CPU: ||grad sum_t f_t log L_t||^2, f_t held constant."""

    def loss(rows: slice) -> Tensor:
        logits, targets = supervised_logits(job.lm, {name: tensor[rows] for name, tensor in batch.items()})
        head = job.lm.read_head()
        rest: Any = {"temperature": head.temperature, "softcap": head.softcap, "inplace_backward": True}
        log_nll = token_stats(logits, targets, ("log_nll",), **rest).log_nll[targets != IGNORE_INDEX]
        return (job.factor(log_nll.detach()) * log_nll).sum()

    return tap.collect(len(batch["input_ids"]), loss, SquaredNorms).cpu()


def hutchinson(job: Job, sigma: float, num_draws: int) -> Estimate:
    """sigma^2 / 2 |Tr M|, the leading order of |E S| (Theorem 3.2): E z'Mz = Tr M (Hutchinson 1989)."""
    if sharded := [weight.name for weight in job.weights if weight.sharded]:
        raise TypeError(f"{sharded[0]}: is sharded; estimator='hutchinson' needs whole weights")
    check_twice_differentiable(job.lm)
    samples = job.samples
    units = {k: f"{k:06d}" for k in job.processes.share(range(num_draws))}
    finished = job.finish(units, lambda k: along_draw(job, k), "mrd hutchinson")
    table = torch.zeros(num_draws, 2, len(samples), dtype=torch.float64)
    for k, values in finished.items():
        table[k] = values
    slopes, bends = job.processes.combine(table).unbind(1)
    check_finite(bends.sum(0), "in its second derivative")
    value, error = (sigma**2 / 2 * x for x in second_order(bends))
    plain = "forward-mode derivatives are taken through plain torch"
    declined = decline_all(
        {
            "shared prefix": "estimator='hutchinson' differentiates whole samples",
            "fused head": plain,
            "fused attention": plain,
        }
    )
    return Estimate(value, error, slopes.abs().mean(0) / math.sqrt(2 / math.pi), bends, {"declined": declined})


@torch.no_grad()
def along_draw(job: Job, draw: int) -> Tensor:
    """(2, n) float64 on the CPU: g.z and z'Mz of every sample, z the noise of this draw."""
    log_odds = LogOdds(job.lm)
    name_of = {id(p): name for name, p in log_odds.named_parameters()}
    values, noise = {}, {}
    for weight in job.weights:
        name, w = name_of[id(weight.parameters[0])], weight.local
        values[name] = w.to(torch.promote_types(w.dtype, torch.float32))
        z = gaussian_noise(w.numel(), seed=job.seed, draw=draw, name=weight.name, device=w.device)
        noise[name] = z.view(w.shape).to(values[name].dtype)
    parts = [derivatives(log_odds, batch, values, noise).double().cpu() for batch in job.samples.batches]
    u, slope, bend = torch.cat(parts, 1)
    # L = softplus(u). L' / L = s u' and L'' / L = s (u'' + sigmoid(-u) u'^2), s = sigmoid(u) / L, 1 for u -> -inf.
    nll, known = torch.logaddexp(u, torch.zeros_like(u)), u < -30
    share = job.factor(torch.where(known, u, nll.log())) * torch.where(known, 1.0, u.sigmoid() / nll)
    terms = share * slope, share * (bend + (-u).sigmoid() * slope.square())
    everything = range(len(job.samples.batches))
    return torch.stack([job.samples.per_sample(term, everything) for term in terms])


def derivatives(
    log_odds: LogOdds, batch: Mapping[str, Tensor], values: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Tensor:
    """(3, N): the log-odds at the weights `values`, their first and their second derivative along `direction`."""
    some = next(iter(values.values()))
    one = torch.ones((), dtype=some.dtype, device=some.device)

    def along(step: Tensor) -> Tensor:
        moved = {name: value + step * direction[name] for name, value in values.items()}
        return torch.func.functional_call(log_odds, moved, (batch,))

    def first(step: Tensor) -> Any:
        return torch.func.jvp(along, (step,), (one,))

    # other attention kernels have no forward derivatives
    with sdpa_kernel(SDPBackend.MATH), Primitives(), plain_experts(log_odds.lm):
        here, derivative = torch.func.jvp(first, (torch.zeros_like(one),), (one,))[:2]
    return torch.stack([*here, derivative[1]])


@torch.no_grad()
def check_twice_differentiable(lm: CausalLM) -> None:
    """Raises TypeError for a model whose forward has no second derivative in forward mode; two tokens tell."""
    log_odds, ids = LogOdds(lm), torch.tensor([[0, 1]], device=lm.device)
    values = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in log_odds.named_parameters()}
    try:
        derivatives(log_odds, {"input_ids": ids, "labels": ids}, values, values)
    except RuntimeError as error:
        raise TypeError(
            f"estimator='hutchinson': the forward of {lm.name} has no second derivative in forward mode "
            f"({str(error).split('. ')[0][:160]}); needs estimator='definition', of which it is the leading order"
        ) from None


@contextmanager
def plain_experts(lm: CausalLM) -> Iterator[None]:
    """Inside, mixtures of experts multiply one expert after the other: grouped products have no forward derivative."""
    if not hasattr(lm.inner, "get_experts_implementation"):
        yield
        return
    before = lm.inner.get_experts_implementation()
    lm.inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        lm.inner.set_experts_implementation(before)


class Primitives(TorchFunctionMode):
    """Spells out what torch cannot differentiate forward twice: silu has no formula, layer_norm a wrong one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SPELLED_OUT.get(func, func)(*args, **(kwargs or {}))


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * x.sigmoid()


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


SPELLED_OUT = {F.silu: silu, F.layer_norm: layer_norm}


class LogOdds(nn.Module):
    """(N,) log((1 - p_t) / p_t) of a batch's scored tokens: L_t = softplus of it, without ever rounding p_t to 1."""

    def __init__(self, lm: CausalLM):
        super().__init__()
        self.lm, self.model = lm, lm.given  # the module's parameters are this one's

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        supervised, head = supervised_hidden(self.lm, batch), self.lm.read_head()
        rows = max(1, HEAD_ELEMENTS // head.weight.size(0))
        parts = []
        for hidden, targets in zip(supervised.hidden.split(rows), supervised.targets.split(rows), strict=True):
            logits, index = head.logits(hidden), targets.unsqueeze(1)
            others = logits.scatter(1, index, -torch.inf)
            parts.append(others.logsumexp(1) - logits.gather(1, index).squeeze(1))
        return torch.cat(parts)
