"""The eager twin: every op in plain PyTorch, any device and dtype; the statistics are differentiable by autograd.

It is the fallback where nothing faster is built and, in float64, the oracle of every test. Half precision is computed
in float32, as in the fused backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Options, check_range
from ..outer_sum import OuterSum
from ..pieces import Noise, Piece
from . import blocks

PERTURB_CHUNK = 1 << 20  # a hundred bytes of temporaries for each


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
    z = no_softmax_is_nan(transform(logits, options).masked_fill(~mask.unsqueeze(-1), 0.0))
    log_p = log_softmax(z)
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
        other = transform(reference.detach().to(z.dtype), options)  # whatever it is kept in: of float64 logits, exact
        log_q = log_softmax(no_softmax_is_nan(other))
        q = log_q.exp()
        values["kl_pq"] = (p * (safe_log_p - log_q.masked_fill(p == 0, 0.0))).sum(-1).clamp_min(0)
        values["kl_qp"] = (q * (log_q.masked_fill(q == 0, 0.0) - log_p.masked_fill(q == 0, 0.0))).sum(-1)
    if "uniform_ce" in options.outputs:
        values["uniform_ce"] = -log_p.mean(-1)
    if "lse" in options.outputs:
        values["lse"] = z.logsumexp(-1)
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


def log_softmax(z: Tensor) -> Tensor:
    """torch's, with the likeliest lane from the sum of all others: it has digits left where its p is nearly 1."""
    log_p, fixed = z.log_softmax(-1), z.detach()
    top, at = fixed.max(-1, keepdim=True)
    exact = -(fixed - top).exp().scatter(-1, at, 0.0).sum(-1, keepdim=True).log1p()
    likeliest = log_p.gather(-1, at)
    return log_p.scatter(-1, at, likeliest + (exact - likeliest.detach()))


def no_softmax_is_nan(z: Tensor) -> Tensor:
    """z, all NaN in rows that hold NaN, +inf or nothing but -inf: so are their statistics and their gradients."""
    bad = ~(z.detach().amax(-1, keepdim=True).abs() < math.inf)
    return z + torch.where(bad, math.nan, 0.0).to(z.dtype)


def log_negative_logp(z: Tensor, index: Tensor) -> Tensor:
    """log(-log p_t) from the log-odds against the target, so that a memorised token (p_t -> 1) stays exact."""
    rest = z.scatter(-1, index, float("-inf"))
    alone = (rest == float("-inf")).all(-1)  # nothing but the target is possible: lanes at -inf have no gradient
    others = rest.masked_fill(alone.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(alone, float("-inf"))
    odds = others - z.gather(-1, index).squeeze(-1)
    small = odds < -15  # there softplus(u) = exp(u) to the last bit of float32; float64 corrects by -exp(u)/2
    ordinary = F.softplus(odds.masked_fill(small, 0.0), threshold=50.0).log()
    tiny = odds.masked_fill(~small, -15.0)  # what is not taken must not overflow: its gradient would be 0 * inf
    return torch.where(small, tiny - 0.5 * tiny.exp(), ordinary)


def segment_dot(pairs: Sequence[tuple[Tensor, Tensor]], block: int = 1 << 22) -> Tensor:
    """(3, pairs) float64 of flat pairs: <a, b>, <a, a>, <b, b>, by blocks of elements widened to float64."""
    sums = torch.zeros(3, len(pairs), dtype=torch.float64, device=pairs[0][0].device)
    for i, (a, b) in enumerate(pairs):
        for x, y in zip(a.split(block), b.split(block), strict=True):
            x, y = x.double(), y.double()
            sums[:, i] += torch.stack((torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)))
    return sums


def ghost_dot(u: OuterSum, v: OuterSum | None) -> Tensor:
    """(B,) float64 of OuterSums of one dtype; v None: of u with itself. Integers alone are u's."""
    return blocks.ghost_dot(u, v, segment_dot)


# ---- noise -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perturb(pieces: Sequence[Piece], table: Tensor, seed: int, add: Noise | None, remove: Noise | None) -> None:
    """What the kernels do with the pieces, by chunks of its own: `table` is not read."""
    for piece in pieces:
        for at, place, first, count in zip(*(column.tolist() for column in piece.chunks(PERTURB_CHUNK)), strict=True):
            target = piece.target[place : place + count]
            source = None if piece.source is None else piece.source[at : at + count]
            target.copy_(perturbed(piece, source, first, count, seed, add, remove))


def perturbed(
    piece: Piece, source: Tensor | None, first: int, count: int, seed: int, add: Noise | None, remove: Noise | None
) -> Tensor:
    """A chunk of a piece, (count,): bfloat16(source - remove) + add; without a source the noise, or its words."""
    device, dtype = piece.target.device, torch.float64 if piece.target.dtype == torch.float64 else torch.float32

    def noise(step: Noise) -> Tensor:
        return normals(seed, step.draw, piece.parameter, first, count, device).float().to(dtype) * step.scale

    if source is None:
        assert add is not None
        if piece.target.dtype == torch.int32:
            return words(seed, add.draw, piece.parameter, first, count, device)
        return noise(add)
    if add is None and remove is None:
        return source
    value = source.to(dtype)
    if remove is not None:
        value = (value - noise(remove)).bfloat16().float()
    return value if add is None else value + noise(add)


def philox(counter: Sequence[Tensor | int], key: int) -> list[Tensor]:
    """Ten rounds of Philox4x32: four words from four, as int64 in [0, 2^32). At least counter[0] is a tensor."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    for i in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits: the sign bit is one of them
        k0, k1 = (key + i * 0x9E3779B9) & low, ((key >> 32) + i * 0xBB67AE85) & low
        c0, c1, c2, c3 = (q >> 32 & low) ^ c1 ^ k0, q & low, (p >> 32 & low) ^ c3 ^ k1, p & low
    return [c0, c1, c2, c3]


def words(seed: int, draw: int, parameter: int, first: int, count: int, device: torch.device) -> Tensor:
    """The words behind elements first .. first + count - 1 as int64, (count,)."""
    block = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    four = philox((block & 0xFFFFFFFF, block >> 32, draw, parameter), seed)
    return torch.stack(torch.broadcast_tensors(*four), -1).flatten()[first % 4 : first % 4 + count]


def normals(seed: int, draw: int, parameter: int, first: int, count: int, device: torch.device) -> Tensor:
    """The normals of elements first .. first + count - 1 in float64, (count,)."""
    begin, end = first // 4 * 4, (first + count + 3) // 4 * 4
    u, v = ((words(seed, draw, parameter, begin, end - begin, device).double() + 0.5) / 2**32).view(-1, 2).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()
    return z[first - begin : first - begin + count]
