"""The peers, where they are installed: the same case by other people's kernels, called as their documentation says.

Written against liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5 and trl 1.16. Where a peer cannot do
the whole case it runs the part it can, and `NOTES` says what is left out; its error is told against that part.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import cases
from .cases import Case, Linear, Logits, Loss, Run, backward

Peer = tuple[Run] | tuple[Run, Loss]  # what runs; the loss it computes where that is not the case's

NOTES = {
    "liger": "per-token loss in the logits' dtype; overwrites the logits; KL: log_softmax of both in torch, then its "
    "JSD kernel with beta 1, the mean alone",
    "liger sum": "less: the sum of the NLL, no weight per token; overwrites the logits",
    "quack": "without gradient and at once less: NLL alone, no entropy, no weight per token",
    "quack scaled exp": "less: one number, the mean; its first GEMM writes powers of e instead of logits, which the "
    "other two scale as they read them: no d(logits) are written",
    "trl": "its fused log-probability and entropy kernels; from hidden states in chunks; KL: the divergence alone",
    "cut-cross-entropy": "NLL alone, also where entropy is asked for; leaves out gradients below 2^-12 (its default)",
    "torch linear_cross_entropy": "the mean NLL",
    "three GEMMs alone": "less: logits, d(hidden) and d(weight) as plain products, no statistics",
    "two GEMMs alone": "less: logits and d(hidden) as plain products, no statistics",
    "one write alone": "less: as much memory as d(logits), in the pages that ours asks for, filled with ones",
    "randn_like + add_": "less: noise added and never taken off again; in the weights' dtype",
    "MeZO": "torch.normal a parameter, from a seed: added, drawn again and subtracted, which is not exact; in the "
    "weights' dtype",
    "torch.dot": "less: <a, b> alone, summed in the tensors' dtype",
    "torch.dot in float64": "less: <a, b> alone",
    "torch._foreach_mul + sum": "less: <a, b> alone, products in the tensors' dtype",
    "reading alone": "less: torch.sum of both sides, each in one piece",
    "(B, T, T) matrices": "both matrices whole, in the tensors' dtype",
    "per-sample gradients": "every sample's gradient whole, in the tensors' dtype",
}


def of(case: Case) -> dict[str, Peer]:
    """Name -> peer, for the peers that are installed and offer something for this case."""
    offered = linear(case) if isinstance(case, Linear) else logits(case)
    return {name: tuple(peer) for (module, name), peer in offered.items() if importlib.util.find_spec(module)}  # type: ignore[misc]


def logits(case: Logits) -> dict[tuple[str, str], Peer]:
    """(module, name) -> peer."""
    if case.name == cases.NLL:
        return {
            ("liger_kernel", "liger"): (liger_tokens, nll_weighted),
            ("liger_kernel", "liger sum"): (liger_sum, nll_sum),
            ("quack", "quack"): (quack_tokens, nll_weighted),
            ("quack", "quack in place"): (quack_tokens_inplace, nll_weighted),
            ("trl", "trl"): (trl_tokens,),
        }
    if case.name == cases.ENTROPY:
        return {("trl", "trl"): (trl_tokens_entropy,)}
    if case.name == cases.STATISTICS:
        return {("trl", "trl"): (trl_statistics,), ("quack", "quack"): (quack_statistics,)}
    if case.name == cases.KL:
        return {("liger_kernel", "liger"): (liger_kl, lambda t, stats: stats["kl_pq"].sum() / case.n)}
    return {("quack", "quack"): (quack_at_once, nll_sum)}


def linear(case: Linear) -> dict[tuple[str, str], Peer]:
    if case.name in (cases.MEAN, cases.BEYOND, cases.FROZEN):
        return {
            ("liger_kernel", "liger"): (liger_linear,),
            ("quack", "quack"): (quack_linear,),
            ("quack", "quack scaled exp"): (quack_scaled_exp,),
            ("cut_cross_entropy", "cut-cross-entropy"): (cce_mean,),
        }
    if case.name == cases.LINEAR_KL:
        return {("trl", "trl"): (trl_linear_kl, kl_weighted)}
    return {
        ("liger_kernel", "liger"): (liger_linear_tokens,),
        ("trl", "trl"): (trl_linear_tokens,),
        ("cut_cross_entropy", "cut-cross-entropy"): (cce_tokens, nll_weighted),
    }


# ---- losses of peers that compute another one ------------------------------------------------------------------------


def nll_sum(t: dict, stats: dict[str, Tensor]) -> Tensor:
    return -stats["logp"].sum()


def kl_weighted(t: dict, stats: dict[str, Tensor]) -> Tensor:
    return (stats["kl_pq"] * t["weights"]).sum()


def nll_weighted(t: dict, stats: dict[str, Tensor]) -> Tensor:
    return -(stats["logp"] * t["weights"]).sum()


# ---- liger-kernel ----------------------------------------------------------------------------------------------------


def liger_tokens(case: Logits, t: dict) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    nll = liger_cross_entropy(t["logits"], t["targets"], reduction="none")
    return backward([nll], [t["logits"]], t["weights"])


def liger_sum(case: Logits, t: dict) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss = liger_cross_entropy(t["logits"], t["targets"], reduction="sum")
    return list(torch.autograd.grad(loss, t["logits"]))


def liger_kl(case: Logits, t: dict) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_jsd

    loss = liger_jsd(t["logits"].log_softmax(-1), t["reference"].log_softmax(-1), beta=1.0)
    return list(torch.autograd.grad(loss, t["logits"]))


def liger_linear(case: Linear, t: dict) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(t["hidden"], t["weight"], t["targets"])
    return list(torch.autograd.grad(loss, case.leaves(t)))


def liger_linear_tokens(case: Linear, t: dict) -> list[Tensor]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    entropy = "entropy" in case.kind.outputs
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    result = apply(t["hidden"], t["weight"], t["targets"], return_entropy=entropy)
    nll, h = result if entropy else (result, None)
    stats: dict[str, Any] = {"logp": -nll, "entropy": h}
    return case.gradients(t, stats)


# ---- quack-kernels ---------------------------------------------------------------------------------------------------


def quack_tokens(case: Logits, t: dict, inplace: bool = False) -> list[Tensor]:
    from quack.cross_entropy import cross_entropy

    nll = cross_entropy(t["logits"], t["targets"], reduction="none", inplace_backward=inplace)
    return backward([nll], [t["logits"]], t["weights"])


def quack_tokens_inplace(case: Logits, t: dict) -> list[Tensor]:
    return quack_tokens(case, t, inplace=True)


def quack_statistics(case: Logits, t: dict) -> list[Tensor | None]:
    from quack.cross_entropy import cross_entropy_fwd

    return [-cross_entropy_fwd(t["logits"], t["targets"]), None]


def quack_at_once(case: Logits, t: dict) -> list[Tensor]:
    from quack.cross_entropy import cross_entropy_fwd

    nll, gradient = cross_entropy_fwd(t["logits"].detach(), t["targets"], return_dx=True)
    return [gradient, -nll]


def quack_linear(case: Linear, t: dict, scaled_exp: bool = False) -> list[Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    how: dict[str, Any] = {"chunk_size": 4096, "use_scaled_exp": scaled_exp}
    loss = chunked_linear_cross_entropy(t["hidden"], t["weight"], t["targets"], **how)
    return list(torch.autograd.grad(loss, case.leaves(t)))


def quack_scaled_exp(case: Linear, t: dict) -> list[Tensor]:
    return quack_linear(case, t, scaled_exp=True)


# ---- trl -------------------------------------------------------------------------------------------------------------


def trl_tokens(case: Logits, t: dict) -> list[Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return case.gradients(t, {"logp": selective_log_softmax(t["logits"], t["targets"])})


def trl_tokens_entropy(case: Logits, t: dict) -> list[Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logp, entropy = selective_log_softmax_and_entropy(t["logits"], t["targets"])
    return case.gradients(t, {"logp": logp, "entropy": entropy})


def trl_statistics(case: Logits, t: dict) -> list[Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return list(selective_log_softmax_and_entropy(t["logits"], t["targets"]))


def trl_linear_tokens(case: Linear, t: dict) -> list[Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    asked = tuple(name for name in case.kind.outputs if name == "entropy")
    arguments = (t["hidden"], t["weight"], None, t["targets"], 1.0, 32768, None, 1.0, asked)  # its trainers' chunk
    logp, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
    return case.gradients(t, {"logp": logp, "entropy": entropy})


def trl_linear_kl(case: Linear, t: dict) -> list[Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (t["hidden"], t["weight"], None, t["ref_hidden"], t["ref_weight"], None, 1.0)  # KL(student || teacher)
    divergence, _ = ChunkedDivergenceFunction.apply(*arguments)
    return backward([divergence], case.leaves(t), t["weights"])


# ---- cut-cross-entropy -----------------------------------------------------------------------------------------------


def cce_mean(case: Linear, t: dict) -> list[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(t["hidden"], t["weight"], t["targets"])
    return list(torch.autograd.grad(loss, case.leaves(t)))


def cce_tokens(case: Linear, t: dict) -> list[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(t["hidden"], t["weight"], t["targets"], reduction="none")
    return backward([nll], case.leaves(t), t["weights"])
