"""`mrd`: the estimators of Memory Removal Difficulty, their errors and their self-checks.

"A Neuro-inspired Interpretation of Unlearning in Large Language Models through Sample-level Unlearning Difficulty",
arXiv:2504.06658. With P_t = log p(x_t | x_<t), L_t = -P_t, noise d ~ N(0, sigma^2 I) on all
weights and S(d) = sum_t (P_t(w) - P_t(w + d)) / P_t(w) = -g.d - d'Md / 2 + ...:

============  ===============================  =======================================================================
estimator     value                            how
============  ===============================  =======================================================================
algorithm1    E |S|                            mean over `num_draws` draws (Algorithm 1; what the paper computes)
gradient      sigma sqrt(2 / pi) ||g||         its leading order, exactly: one backward and ghost norms
definition    |E S|                            antithetic pairs (z, -z) at `sigma_eval`, times (sigma / sigma_eval)^2
hutchinson    sigma^2 / 2 |Tr M|               its leading order (Theorem 3.2): mean of z'Mz, forward over forward
initial       E |sum_t P_t(w) - P_t(w + d)|    Eq. 3, with num_draws=1: as algorithm1, not divided by P_t(w)
============  ===============================  =======================================================================

The paper gives the first two lines and the next two as one quantity; they are not (E |S| is of first order in sigma,
|E S| of second), so each has its name. Smaller is harder to unlearn. Tokens 2 .. n with a label other than -100 count
(the paper's sum is over a whole sample, which labels=input_ids gives; runs score the answers unless told otherwise);
no length normalisation (Eq. 4 has none, the text speaks of one: `normalize="tokens"`).

Perturbed weights, and all that follows from them, are IEEE float32 at least: bfloat16 or TF32 rounding is larger than
what sigma = 1e-5 does, and MRD would be the size of the rounding whatever sigma is. `diagnostics` has the check.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._hints import check_known
from ..distributed import Processes
from ..model.causal_lm import CausalLM, eval_mode
from ..model.fingerprint import dataset_fingerprint, model_fingerprint
from ..model.lora import merged_names
from ..model.precision import full_precision
from ..ops.noise import DRAWS, SEEDS, check_range
from ..ops.parameters import weights_of
from ..store import Store
from .derivatives import check_twice_differentiable, gradient, hutchinson
from .monte_carlo import Shaking, monte_carlo
from .samples import make_samples
from .work import FORMAT, Factor, Job

Estimator = Literal["algorithm1", "definition", "gradient", "hutchinson", "initial"]
ESTIMATORS = get_args(Estimator)
CHECKS = (
    "mode",
    "shared_prefix",
    "declined",
    "by_heart_share",
    "sigma_ratio",
    "expected_ratio",
    "noise_floor",
    "noise_share",
)
LINEAR = 0.1  # sigma ||g|| up to which E |S| is within about 1 % of its leading order


@dataclass(frozen=True)
class MRDResult:
    """One entry a sample, in the order of the batches' rows.

    value: (n,) float64. standard_error: (n,) float64; 0 for `gradient`, which draws nothing; NaN for one draw.
    num_tokens: (n,) int64, scored. linear_ok: (n,) bool, whether sigma ||g|| <= 0.1, so that E |S| is within about 1 %
    of its leading order; estimated from the draws where there are any.
    draws: (num_draws, n) float64, the statistic of every draw (S; (S(z) + S(-z)) / 2; z'Mz), unscaled; None for
    `gradient`. diagnostics: see `mrd`.
    """

    value: Tensor
    standard_error: Tensor
    num_tokens: Tensor
    linear_ok: Tensor
    draws: Tensor | None
    diagnostics: dict[str, Any]


def mrd(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    estimator: Estimator = "algorithm1",
    num_draws: int = 200,
    sigma: float = 1e-5,
    seed: int = 0,
    *,
    sigma_eval: float = 3e-4,
    batch_size: int = 8,
    parameters: Collection[str] | None = None,
    normalize: Literal["tokens"] | None = None,
    paper_eps: float | None = None,
    state: str | os.PathLike[str] | None = None,
    split: Literal["draws", "data"] = "draws",
    mode: str = "auto",
    check_draws: int = 8,
    allow_low_precision: bool = False,
    progress: bool = True,
) -> MRDResult:
    """Memory Removal Difficulty of every sample of `batches`; pyunlearn.mrd.estimate has a table of the estimators.

    Args:
        model: a transformers causal LM in float32 (or float64); it is in eval() meanwhile and unchanged afterwards.
        batches: dicts of input_ids (B, T), labels (B, T; -100 is not scored) and attention_mask (B, T; default: all
            real). They are taken apart: padding never changes a score. Labels of `pyunlearn.data.collate` score the
            answers; with labels=input_ids whole samples are scored, as in the paper's equations.
        num_draws: K, draws of noise over all weights, each shared by all samples; 2 at least (`initial`: 1). The
            relative standard error of `algorithm1` is 0.756 / sqrt(K). Unused by `gradient`. `definition` takes two
            forwards a draw; `hutchinson` the time of about ten, and memory for several copies of the weights.
        sigma: standard deviation of the noise. seed: 0 <= seed < 2^64.
        sigma_eval: where `definition` is evaluated: at 1e-5 its second-order effect is below float32 rounding.
        batch_size: samples of a forward, of similar length.
        parameters: names of the parameters that are perturbed; default all, frozen ones too. Under peft the default
            is what the merged model has: the weights of the base, and copies of modules_to_save in the place of theirs.
            Under plain LoRA, noise on W of W + BA is noise on the merged weight: the score is the merged model's.
        normalize: "tokens" divides by the number of scored tokens.
        paper_eps: a number added to |P_t(w)| in the denominator; default none, it needs none.
        state: a folder in which every finished draw is kept; the same call takes it up there, with the same bits on
            the same machine with as many threads. More draws may be asked for later.
        split: what processes under torchrun share out: "draws", or "data" (every process makes all draws of its
            batches). The result is the same to the last bit, on every process.
        mode: how weights are perturbed, see `perturbed`.
        check_draws: draws of the self-check of the estimators that perturb, 0 for none.
        allow_low_precision: takes a model in half precision, and leaves the caller's autocast and TF32 switched on.
            Under the modes "overlay" and "streamed" half-precision weights are float32 inside all the same.
        progress: a bar on stderr.

    Returns:
        MRDResult. `diagnostics`: estimator, num_draws, sigma, sigma_eval, seed, normalize, paper_eps, num_samples,
        num_tokens (of all samples), mode; shared_prefix, how many tokens all samples begin with and went through the
        model once a draw, not once a sample; declined, by optimisation that was not used, why ("shared prefix", "mode"
        for what "auto" did not take, "fused head", "fused attention", "one backward a batch"); share_linear_ok;
        by_heart_share, the share of sum_t |r_t| that comes from tokens with L_t < 1e-6; and of the self-check, on at
        least 8 samples where there are as many: sigma_ratio, the value at twice the sigma over that at sigma, and
        expected_ratio (2, or 4 for `definition`); noise_floor, what a draw's statistic is at sigma / 1024 (all but
        rounding is gone), in units of `value` before normalisation, and noise_share, it over the statistic at sigma.
        None where it does not apply, or where that step moves no weight.

    Raises:
        ValueError: an argument out of range; a half-precision model without allow_low_precision; a sample without a
            scored token or with a score that is not finite; `state` of another job, or a file in it that was changed.
        TypeError: batches that are none; a model that is no causal LM of text; for `gradient` and `hutchinson` a
            parameter that is sharded, for `hutchinson` what `check_estimator` raises.
    """
    check_arguments(estimator, num_draws, sigma, seed, sigma_eval, batch_size, normalize, paper_eps, split, check_draws)
    lm = CausalLM(CausalLM.of(model).alone)
    if parameters is None:
        parameters = merged_names(lm.given)
    weights = weights_of(lm.given, parameters)
    for name, parameter in lm.given.named_parameters():
        if parameter.dtype.itemsize < 4 and not allow_low_precision:
            raise ValueError(
                f"model: {name} is {parameter.dtype}, in which sigma={sigma:g} drowns in rounding; load the model in "
                "float32, or pass allow_low_precision=True"
            )
    samples = make_samples(batches, batch_size, lm.device)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "estimator": estimator,
        "seed": seed,
        "batch_size": batch_size,
        "parameters": None if parameters is None else [weight.name for weight in weights],
        "paper_eps": paper_eps,
        "precision": f"the caller's, {mode}" if allow_low_precision else "float32",
    }
    if state is not None:
        identity |= {"model": model_fingerprint(lm), "data": dataset_fingerprint(samples.rows)}
    processes = Processes(lm.device, together=any(weight.sharded for weight in weights))
    store = processes.in_turn(lambda: Store(None if state is None else os.fspath(state), identity, what="state"))
    job = Job(lm, weights, samples, seed, make_factor(estimator, paper_eps), store, processes, progress)
    at = sigma_eval if estimator == "definition" else sigma
    with nullcontext() if allow_low_precision else full_precision(lm.device), eval_mode(lm.given):
        lm.check_head()
        if estimator == "gradient":
            estimate = gradient(job, sigma)
        elif estimator == "hutchinson":
            estimate = hutchinson(job, sigma, num_draws)
        else:
            shaking = Shaking(estimator == "definition", split, mode, parameters)
            estimate = monte_carlo(job, shaking, sigma, at, num_draws, check_draws)
    lengths = samples.num_tokens if normalize == "tokens" else torch.ones_like(samples.num_tokens)
    linear_ok = sigma * estimate.slope <= LINEAR
    diagnostics = {
        "estimator": estimator,
        "num_draws": 0 if estimate.draws is None else num_draws,
        "sigma": sigma,
        "sigma_eval": at,
        "seed": seed,
        "normalize": normalize,
        "paper_eps": paper_eps,
        "num_samples": len(samples),
        "num_tokens": int(samples.num_tokens.sum()),
        "share_linear_ok": float(linear_ok.double().mean()),
        **dict.fromkeys(CHECKS),
        **estimate.diagnostics,
    }
    return MRDResult(
        estimate.value / lengths, estimate.error / lengths, samples.num_tokens, linear_ok, estimate.draws, diagnostics
    )


def check_estimator(estimator: str, model: nn.Module) -> None:
    """Raises TypeError for an estimator that the model does not have, from a forward of two tokens."""
    if estimator == "hutchinson":
        lm = CausalLM(CausalLM.of(model).alone)
        with eval_mode(lm.given):
            check_twice_differentiable(lm)


def make_factor(estimator: str, paper_eps: float | None) -> Factor:
    """log L_t -> f_t: what a token's relative change counts."""
    if estimator == "initial":
        return lambda log_nll: -log_nll.exp()
    if paper_eps is None:
        return torch.ones_like
    return lambda log_nll: (log_nll - math.log(paper_eps)).sigmoid()  # L / (L + eps)


def check_arguments(
    estimator: str = "algorithm1",
    num_draws: int = 200,
    sigma: float = 1e-5,
    seed: int = 0,
    sigma_eval: float = 3e-4,
    batch_size: int = 8,
    normalize: str | None = None,
    paper_eps: float | None = None,
    split: str = "draws",
    check_draws: int = 8,
) -> None:
    """Raises what `mrd` raises for these, before anything is computed."""
    check_known("estimator", estimator, ESTIMATORS)
    check_known("normalize", normalize, (None, "tokens"))
    check_known("split", split, ("draws", "data"))
    for name, value in (("sigma", sigma), ("sigma_eval", sigma_eval), ("paper_eps", paper_eps)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: needs a finite number > 0")
    check_range("seed", seed, SEEDS)
    check_range("num_draws", num_draws, DRAWS)
    check_range("check_draws", check_draws, DRAWS)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needs a whole number >= 1")
    least = {"initial": 1, "gradient": 0}.get(estimator, 2)
    if num_draws < least:
        raise ValueError(
            f"num_draws={num_draws}: needs {least} at least{', for a standard error' if least > 1 else ''}"
        )
    if paper_eps is not None and estimator == "initial":
        raise ValueError(f"paper_eps={paper_eps!r}: Eq. 3 has no denominator; needs None for estimator='initial'")
