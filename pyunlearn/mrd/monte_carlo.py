"""Draws of noise, outermost and shared by all samples; and per draw and sample the statistic of the estimator.

With L_t = -log p(x_t | x_<t) of the weights w and L_t' of w + sigma z, from the kernel's log L, finite and right for
tokens known by heart:

    r_t = (P_t(w) - P_t(w + sigma z)) / P_t(w) = 1 - L_t' / L_t = -expm1(log L_t' - log L_t),     S = sum_t f_t r_t.

f_t is 1 (Definition 3.1, Algorithm 1), L_t / (L_t + eps) with an epsilon, or -L_t (Eq. 3). Differences and sums are
float64, in the order of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._declined import decline
from ..model.forward import supervised_hidden
from ..model.head import head_stats
from ..model.prefix import Prefix, shared_prefix
from ..ops import perturbed
from .samples import Samples
from .work import Estimate, Job, check_finite, first_order, second_order

# What a draw leaves of each sample: the statistic; |S|; sum_t |f_t r_t|; the same over tokens known by heart
STATISTIC, MAGNITUDE, ABSOLUTE, BY_HEART = range(4)
KNOWN_BY_HEART = 1e-6  # nats: L_t below it
CHECK_SAMPLES = 8
FLOOR = 1 / 1024  # of sigma: moves what rounds, and next to nothing else


@dataclass
class Shaking:
    """How weights are perturbed. antithetic: the statistic is (S(z) + S(-z)) / 2 in the place of S(z).

    split: what processes share out, "draws" or "data" (batches). mode, parameters: of `perturbed`; mode is the one
    taken, once there were draws. prefix: `shared_prefix`. declined: by optimisation that is not used, why.
    """

    antithetic: bool
    split: str
    mode: str
    parameters: Collection[str] | None
    prefix: Prefix | None = None
    declined: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def monte_carlo(
    job: Job, shaking: Shaking, sigma: float, sigma_eval: float, num_draws: int, check_draws: int
) -> Estimate:
    """The mean of |S|, or the mean of S over antithetic pairs at sigma_eval scaled to sigma; and the self-check."""
    samples, everything = job.samples, list(range(len(job.samples.batches)))
    shaking.prefix, reason = shared_prefix(job.lm, samples.rows, samples.batches[-1])
    if reason is not None:
        shaking.declined["shared prefix"] = decline("shared prefix", reason)
    summed = second_order if shaking.antithetic else first_order
    scale = (sigma / sigma_eval) ** 2 if shaking.antithetic else 1.0
    table = draw_table(job, shaking, sigma_eval, num_draws, everything, "mrd")
    value, error = (scale * x for x in summed(table[:, STATISTIC]))
    diagnostics: dict[str, Any] = {
        "mode": shaking.mode,
        "shared_prefix": 0 if shaking.prefix is None else shaking.prefix.tokens.size(1),
        "declined": shaking.declined,
        "by_heart_share": float(table[:, BY_HEART].sum() / table[:, ABSOLUTE].sum()),
    }
    if check_draws:
        some, count = check_batches(samples), min(check_draws, num_draws)
        members = [i for j in some for i in samples.members[j]]
        twice = draw_table(job, shaking, 2 * sigma_eval, count, some, "mrd at 2 sigma")
        floor = draw_table(job, shaking, FLOOR * sigma_eval, count, some, "noise floor")
        once, twice, floor = (part[:count, STATISTIC, members] for part in (table, twice, floor))
        diagnostics |= {
            "sigma_ratio": float(summed(twice)[0].sum() / summed(once)[0].sum()),
            "expected_ratio": 4.0 if shaking.antithetic else 2.0,
        }
        if bool(floor.any()):  # else no weight moved
            diagnostics["noise_floor"] = float(scale * floor.abs().mean())
            diagnostics["noise_share"] = float(floor.abs().mean() / once.abs().mean())
    slope = table[:, MAGNITUDE].mean(0) / (sigma_eval * math.sqrt(2 / math.pi))
    return Estimate(value, error, slope, table[:, STATISTIC], diagnostics)


def check_batches(samples: Samples) -> list[int]:
    """Batches of middling length with CHECK_SAMPLES samples together, whole: their composition stays as it is."""
    some: list[int] = []
    middle = (len(samples.batches) - 1) // 2
    for j in sorted(range(len(samples.batches)), key=lambda j: abs(j - middle)):
        if sum(len(samples.members[i]) for i in some) >= CHECK_SAMPLES:
            break
        some.append(j)
    return sorted(some)


def draw_table(
    job: Job, shaking: Shaking, sigma: float, num_draws: int, batches: Sequence[int], description: str
) -> Tensor:
    """(num_draws, 4, n) float64 on the CPU: STATISTIC, MAGNITUDE, ABSOLUTE, BY_HEART; 0 for samples of other batches.

    Raises ValueError for a score that is not finite.
    """
    processes, part = job.processes, ""
    mine, here = list(range(num_draws)), list(batches)
    if shaking.split == "draws":
        mine = processes.share(mine)
    elif processes.count > 1:
        here, part = processes.share(here), f"-{processes.rank}of{processes.count}"
    units = {k: f"{sigma:.17g}-{k:06d}{part}" for k in mine} if here else {}
    signs = (1, -1) if shaking.antithetic else (1,)
    noise: Any = {"sigma": sigma, "seed": job.seed, "mode": shaking.mode, "parameters": shaking.parameters}
    with perturbed(job.lm.given, draw=None, **noise) as shaken:
        shaking.mode = shaken.mode
        if shaken.declined is not None:
            shaking.declined["mode"] = shaken.declined  # `perturbed` has logged it
        clean: list[Tensor] = []

        def compute(k: int) -> Tensor:
            if not clean:  # before any draw: the weights as they are
                clean.append(log_nll(job, shaken, here, shaking.prefix))
            terms = []
            for sign in signs:
                shaken.to(k, sign)
                moved = log_nll(job, shaken, here, shaking.prefix)
                terms.append(job.factor(clean[0]) * -torch.expm1(moved - clean[0]))
            return record(job.samples, clean[0], terms, here, k)

        finished = job.finish(units, compute, description)
    table = torch.zeros(num_draws, 4, len(job.samples), dtype=torch.float64)
    for k, values in finished.items():
        table[k] = values
    return processes.combine(table)


def log_nll(job: Job, shaken: perturbed, batches: Sequence[int], prefix: Prefix | None) -> Tensor:
    """(N,) float64 on the CPU: log L_t of every scored token of these batches, for the weights as they stand."""
    cache = None if prefix is None else prefix.fill(job.lm)
    parts = []
    for j in batches:
        inputs = job.samples.batches[j]
        supervised = supervised_hidden(job.lm, inputs if prefix is None else prefix.cut(inputs, cache))
        with shaken.resident(job.lm.head_layer):
            head = job.lm.read_head()
            parts.append(head_stats(head, supervised.hidden, supervised.targets, ("log_nll",)).log_nll)
    return torch.cat(parts).double().cpu()


def record(samples: Samples, clean: Tensor, terms: Sequence[Tensor], batches: Sequence[int], draw: int) -> Tensor:
    """(4, n) of one draw, from the f_t r_t (N,) of each sign."""
    sums = torch.stack([samples.per_sample(term, batches) for term in terms])
    absolute = torch.stack(list(terms)).abs().mean(0)
    by_heart = torch.where(clean.exp() < KNOWN_BY_HEART, absolute, 0.0)
    rest = [samples.per_sample(part, batches) for part in (absolute, by_heart)]
    check_finite(sums.sum(0), f"in draw {draw}")
    return torch.stack([sums.mean(0), sums.abs().mean(0), *rest])
