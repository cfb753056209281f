"""The eager twin: every statistic in plain PyTorch, any device and dtype, differentiable by autograd.

It is the fallback where nothing faster is built and, in float64, the oracle of every test. Half precision is computed
in float32, as in the fused backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Options, check_range


def transform(logits: Tensor, options: Options) -> Tensor:
    """z of the contract, in the statistics' dtype."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z if options.temperature == 1.0 else z / options.temperature


def token_stats(logits: Tensor, targets: Tensor, reference: Tensor | None, options: Options) -> Tensor:
    """Stacked statistics (len(options.outputs), *targets.shape)."""
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(targets, logits.size(-1), options.ignore_index)
    mask = targets != options.ignore_index
    inside = (targets >= 0) & (targets < logits.size(-1))
    index = torch.where(inside, targets, 0).long().unsqueeze(-1)
    # an ignored row must not leak a NaN into the gradient, whatever it holds
    z = transform(logits, options).masked_fill(~mask.unsqueeze(-1), 0.0)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    safe_log_p = log_p.masked_fill(p == 0, 0.0)  # lanes at -inf contribute 0
    values: dict[str, Tensor] = {}

    if "logp" in options.outputs:
        values["logp"] = log_p.gather(-1, index).squeeze(-1)
    if "log_nll" in options.outputs:
        values["log_nll"] = log_negative_logp(z, index)
    if "entropy" in options.outputs or "variance" in options.outputs:
        entropy = -(p * safe_log_p).sum(-1)
        values["entropy"] = entropy
        values["variance"] = (p * (safe_log_p + entropy.unsqueeze(-1)).square()).sum(-1).detach()
    if reference is not None and ("kl_pq" in options.outputs or "kl_qp" in options.outputs):
        log_q = transform(reference.detach(), options).log_softmax(-1)
        q = log_q.exp()
        values["kl_pq"] = (p * (safe_log_p - log_q.masked_fill(p == 0, 0.0))).sum(-1).clamp_min(0)
        values["kl_qp"] = (q * (log_q.masked_fill(q == 0, 0.0) - log_p.masked_fill(q == 0, 0.0))).sum(-1)
    if "uniform_ce" in options.outputs:
        values["uniform_ce"] = -log_p.mean(-1)
    if "greedy" in options.outputs:
        best = z.detach() == z.detach().amax(-1, keepdim=True)
        earlier = best.cumsum(-1).gather(-1, index) == 1
        values["greedy"] = (best.gather(-1, index) & earlier).squeeze(-1).to(p.dtype)
    if "topk" in options.outputs:
        order = z.detach().sort(dim=-1, descending=True, stable=True).indices[..., : options.k]
        belief = p.detach().gather(-1, order)
        belief = belief / belief.sum(-1, keepdim=True)
        values["topk"] = (belief * safe_log_p.gather(-1, order)).sum(-1)

    stacked = torch.stack([values[name] for name in options.outputs])
    stacked = torch.where(mask, stacked, 0.0)
    return torch.where(inside | ~mask, stacked, float("nan"))


def log_negative_logp(z: Tensor, index: Tensor) -> Tensor:
    """log(-log p_t) from the log-odds against the target, so that a memorised token (p_t -> 1) stays exact."""
    others = z.scatter(-1, index, float("-inf")).logsumexp(-1)
    odds = others - z.gather(-1, index).squeeze(-1)
    small = odds < -15  # there softplus(u) = exp(u) to the last bit of float32; float64 corrects by -exp(u)/2
    ordinary = F.softplus(odds.masked_fill(small, 0.0), threshold=50.0).log()
    return torch.where(small, odds - 0.5 * odds.exp(), ordinary)


def segment_dot(pairs: Sequence[tuple[Tensor, Tensor]], block: int = 1 << 22) -> Tensor:
    """(3, pairs) float64 of flat pairs: <a, b>, <a, a>, <b, b>, by blocks of elements widened to float64."""
    sums = torch.zeros(3, len(pairs), dtype=torch.float64, device=pairs[0][0].device)
    for i, (a, b) in enumerate(pairs):
        for x, y in zip(a.split(block), b.split(block), strict=True):
            x, y = x.double(), y.double()
            sums[:, i] += torch.stack((torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)))
    return sums
