"""The paper's observations, each a comparison on the records: the first line is what the paper says, the rest when
it holds here. Each gives whether it does, and the figures.

"sum" is over the probes of a run, which stand for its steps: the G-effect cumulates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

from scipy.stats import pearsonr, spearmanr

from .figures import Records, finite, series
from .runs import ALPHAS, BETAS, DEPTHS, PAIRS, RATES, SCALES, SCATTER_STEPS, TOKEN_BETAS, Record

FORGETS = {
    "GA": "ga",
    "WGA": "wga-1",
    "NPO": "npo-0.5",
    "TNPO": "tnpo-1",
    "WTNPO": "wtnpo-0.1-0.5",
    "PO": "po",
    **{f"RMU {depth}": f"rmu-{depth}-5" for depth in DEPTHS},
}
METRICS = ("unlearn", "retain")
Checked = tuple[bool, str]


class Observation(NamedTuple):
    where: str  # section of the paper
    claim: str
    criterion: str
    check: Callable[[Records], Checked]


OBSERVATIONS: list[Observation] = []


def observation(where: str) -> Callable[[Callable[[Records], Checked]], None]:
    def add(check: Callable[[Records], Checked]) -> None:
        claim, _, criterion = inspect.cleandoc(check.__doc__ or "").partition("\n\n")
        OBSERVATIONS.append(Observation(where, claim.rstrip("."), " ".join(criterion.rstrip(".").split()), check))

    return add


def number(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())


def totals(record: Record, metric: str) -> list[float]:
    return series(record, "total", metric)[1]


def summed(record: Record, metric: str) -> float:
    return math.fsum(totals(record, metric))


def cost(record: Record) -> float:
    """What retention loses for what removal gains: the ratio of the summed G-effects."""
    removal = summed(record, "unlearn")
    return summed(record, "retain") / removal if removal else math.nan


def shares(record: Record) -> dict[str, float]:
    """Each group's part in the unlearning G-effect, by size, summed."""
    groups = finite(record)[0]["groups"]["unlearn"]
    sizes = {group: math.fsum(map(abs, series(record, "groups", "unlearn", group)[1])) for group in groups}
    return {group: size / math.fsum(sizes.values()) for group, size in sizes.items()}


def decreasing(values: list[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


def retaining(records: Records, name: str) -> list[float]:
    """The retaining G-effect of a run's retain term alone."""
    return series(records[name], "terms", f"retain.{name.partition('+')[2]}", "retain")[1]


@observation("4.1, 4.2, 6")
def shallow_first(records: Records) -> Checked:
    """Unlearning affects shallow layers more.

    shallow's share in the unlearning G-effect is above middle's and deep's in every objective.
    """
    by_objective = {label: shares(records[name]) for label, name in FORGETS.items()}
    first = [label for label, share in by_objective.items() if share["shallow"] > max(share["middle"], share["deep"])]
    parts = "; ".join(
        f"{label} {' / '.join(f'{share[group]:.0%}' for group in ('shallow', 'middle', 'deep'))}"
        for label, share in by_objective.items()
    )
    return (
        len(first) == len(by_objective),
        f"in {len(first)} of {len(by_objective)} objectives; shallow / middle / deep "
        f"(RMU reaches nothing above its layer): {parts}",
    )


@observation("4.1")
def ends_of_the_model(records: Records) -> Checked:
    """The input embedding has a negligible part in GA, the output layer a large one that does not converge.

    embed has the smallest share of all groups, and at the end lm_head keeps the largest part of its own peak.
    """
    share, left = shares(records["ga"]), {}
    for group in share:
        values = [abs(value) for value in series(records["ga"], "groups", "unlearn", group)[1]]
        left[group] = values[-1] / max(values)
    holds = min(share, key=lambda g: share[g]) == "embed" and max(left, key=lambda g: left[g]) == "lm_head"
    return holds, f"shares: {listed(share)}; last over peak: {listed(left)}"


@observation("4.1")
def ga_costs(records: Records) -> Checked:
    """GA removes at a similar or greater cost to retention.

    the two G-effects of GA correlate above 0.9 over the run, and at some step the retaining one is the more
    negative.
    """
    removal, retention = (totals(records["ga"], metric) for metric in METRICS)
    correlation = float(pearsonr(removal, retention).statistic)
    worse = sum(r < u for u, r in zip(removal, retention, strict=True))
    return correlation > 0.9 and worse > 0, (
        f"correlation {correlation:.3f}; lowest {number(min(removal))} (unlearning) and {number(min(retention))} "
        f"(retaining), which is the lower one at {worse} of {len(removal)} probes; "
        f"ratio of the sums {cost(records['ga']):.2f}"
    )


@observation("4.1, C.1")
def early_ga(records: Records) -> Checked:
    """Early on, even GA gains more than it costs.

    up to the step where the unlearning G-effect reaches half of its lowest value, the ratio of the sums is below 1.
    """
    steps, removal = series(records["ga"], "total", "unlearn")
    retention = totals(records["ga"], "retain")
    until = next(i for i, value in enumerate(removal) if value <= min(removal) / 2)
    early, late = (sum(retention[part]) / sum(removal[part]) for part in (slice(until + 1), slice(until + 1, None)))
    return early < 1, f"ratio {early:.2f} up to step {steps[until]}, {late:.2f} after it"


@observation("4.1")
def small_rates(records: Records) -> Checked:
    """GA at a small learning rate, an extent under control, gains more than it costs.

    the smaller the learning rate, the smaller the ratio of the sums.
    """
    runs = [records["ga" if rate == 1 else f"ga-rate-{rate}"] for rate in sorted((1, *RATES))]
    ratios = {f"{run['settings']['unlearn']['learning_rate']:g}:": cost(run) for run in runs}
    return decreasing([-ratio for ratio in ratios.values()]), f"ratio at {listed(ratios)}"


@observation("4.1, C.1")
def inverse_confidence(records: Records) -> Checked:
    """The inverse confidence explodes under GA.

    GA's highest mean of 1/p is at least ten times those of WGA (alpha = 1) and NPO (beta = 0.5).
    """
    names = {"GA": "ga", "WGA": "wga-1", "NPO": "npo-0.5"}
    top = {label: max(series(records[name], "log10_inverse_confidence")[1]) for label, name in names.items()}
    return top["GA"] > 1 + max(top["WGA"], top["NPO"]), f"log10 of the highest: {listed(top)} (the paper: 17 under GA)"


@observation("4.1, D.1")
def wga_curbs(records: Records) -> Checked:
    """WGA curbs excessive unlearning, even with a small alpha.

    for every alpha both the ratio of the sums and the lowest retaining G-effect are closer to 0 than GA's.
    """
    runs = {"GA": records["ga"], **{f"alpha {alpha}:": records[f"wga-{alpha}"] for alpha in ALPHAS}}
    ratios, lowest = (
        {label: f(run) for label, run in runs.items()} for f in (cost, lambda r: min(totals(r, "retain")))
    )
    holds = all(ratios[label] < ratios["GA"] and lowest[label] > lowest["GA"] for label in list(runs)[1:])
    return holds, f"ratio: {listed(ratios)}; lowest retaining G-effect: {listed(lowest)}"


@observation("D.1")
def alpha_weakens(records: Records) -> Checked:
    """A larger alpha unlearns less.

    the unlearning G-effect's lowest value rises with alpha.
    """
    lowest = {f"alpha {alpha}:": min(totals(records[f"wga-{alpha}"], "unlearn")) for alpha in ALPHAS}
    return decreasing([-value for value in lowest.values()]), listed(lowest)


@observation("4.2")
def npo_smaller(records: Records) -> Checked:
    """NPO's G-effects are smaller than GA's and the smaller, the larger beta.

    the peaks of both fall from GA on with every beta.
    """
    runs = {"GA": records["ga"], **{f"beta {beta}:": records[f"npo-{beta}"] for beta in BETAS}}
    peaks = {m: {label: max(map(abs, totals(run, m))) for label, run in runs.items()} for m in METRICS}
    holds = all(decreasing(list(peak.values())) for peak in peaks.values())
    return holds, "; ".join(f"{metric}: {listed(peak)}" for metric, peak in peaks.items())


@observation("4.2")
def npo_ratio(records: Records) -> Checked:
    """NPO costs less than it gains at beta = 1 and 2.

    the ratio of the sums is below 1, and below GA's.
    """
    ratios = {"GA": cost(records["ga"]), **{f"beta {beta}:": cost(records[f"npo-{beta}"]) for beta in BETAS}}
    return all(ratios[f"beta {beta}:"] < min(1, ratios["GA"]) for beta in (1, 2)), f"ratio: {listed(ratios)}"


@observation("4.2, C.2")
def early_stopping(records: Records) -> Checked:
    """NPO's weight acts like early stopping.

    for every beta the mean weight falls from 1 to below 0.05, and a larger beta never has it below one half later.
    """
    last, half = {}, {}
    for beta in BETAS:
        steps, weights = series(records[f"npo-{beta}"], "weights", "forget.npo")
        last[f"beta {beta}:"] = weights[-1]
        half[f"beta {beta}:"] = next((step for step, w in zip(steps, weights, strict=True) if w < 0.5), math.inf)
    times = list(half.values())
    holds = max(last.values()) < 0.05 and times == sorted(times, reverse=True) and times[0] > times[-1]
    return holds, f"weight at the end: {listed(last)}; first step below one half: {listed(half)}"


@observation("4.2, F.1")
def weighted_samples(records: Records) -> Checked:
    """NPO weighs those samples more whose retaining PG-effect is near 0, which also contribute less to unlearning.

    for every beta and at every step the weight's rank correlation with the size of either PG-effect is negative.
    """
    ranks: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for beta, step in product(BETAS, SCATTER_STEPS):
        points = records[f"npo-{beta}"]["points"][str(step)]
        for metric in METRICS:
            rank = spearmanr(points["weight"], [abs(value) for value in points[metric]]).statistic
            ranks[metric][f"beta {beta} step {step}:"] = float(rank)
    holds = all(rank < 0 for each in ranks.values() for rank in each.values())
    return holds, "rank correlation; " + "; ".join(f"{metric}: {listed(each)}" for metric, each in ranks.items())


@observation("4.2, D.2")
def tnpo_ratio(records: Records) -> Checked:
    """TNPO removes at next to no cost, least at beta = 1.

    at beta = 1 TNPO's ratio of the sums is below NPO's (beta = 1) and below TNPO's at 0.1.
    """
    ratios = {"NPO beta 1:": cost(records["npo-1"])}
    ratios |= {f"TNPO beta {beta}:": cost(records[f"tnpo-{beta}"]) for beta in TOKEN_BETAS}
    one = ratios["TNPO beta 1:"]
    return one < min(ratios["NPO beta 1:"], ratios["TNPO beta 0.1:"]), f"ratio: {listed(ratios)}"


@observation("D.2")
def wtnpo_calmer(records: Records) -> Checked:
    """WTNPO further stabilises TNPO, at the cost of strength.

    at beta = 0.1 and alpha = 0.5 its lowest retaining and its lowest unlearning G-effect are both closer to 0 than
    TNPO's.
    """
    runs = {"TNPO beta 0.1:": records["tnpo-0.1"]}
    runs |= {f"WTNPO beta {b} alpha {a}:": records[f"wtnpo-{b}-{a}"] for b, a in PAIRS}
    lowest = {m: {label: min(totals(run, m)) for label, run in runs.items()} for m in METRICS}
    holds = all(each["WTNPO beta 0.1 alpha 0.5:"] > each["TNPO beta 0.1:"] for each in lowest.values())
    return holds, "lowest; " + "; ".join(f"{metric}: {listed(each)}" for metric, each in lowest.items())


@observation("4.3")
def po_relearns(records: Records) -> Checked:
    """PO removes in the early steps only, and may then even help to relearn.

    the unlearning G-effect is negative in the first probe and above 0 at some later one.
    """
    steps, removal = series(records["po"], "total", "unlearn")
    above = [step for step, value in zip(steps, removal, strict=True) if value > 0]
    since = f" from step {above[0]} on" if above else ""
    risk = series(records["po"], "nll", "unlearn")[1]
    return removal[0] < 0 and bool(above), (
        f"lowest {number(min(removal))} at step {steps[removal.index(min(removal))]}, first {number(removal[0])}, last "
        f"{number(removal[-1])}; above 0 at {len(above)} of {len(steps)} probes{since}; risk {number(risk[0])} to "
        f"{number(max(risk))} at most and {number(risk[-1])} at the end"
    )


@observation("4.3, C.3")
def rmu_depth(records: Records) -> Checked:
    """RMU is very sensitive to the layer.

    at c = 5 the lowest unlearning G-effects of the three depths are more than a factor of 2 apart.
    """
    lowest = {depth: min(totals(records[f"rmu-{depth}-5"], "unlearn")) for depth in DEPTHS}
    ratios = {depth: cost(records[f"rmu-{depth}-5"]) for depth in DEPTHS}
    holds = max(lowest.values()) > min(lowest.values()) / 2
    return holds, f"lowest: {listed(lowest)}; ratio of the sums: {listed(ratios)}"


@observation("C.3")
def rmu_scale(records: Records) -> Checked:
    """RMU is sensitive to c; a wrong one does the contrary of unlearning.

    at some depth and c the unlearning G-effects sum up above 0, at others below.
    """
    sums = {f"{d} c={c}:": summed(records[f"rmu-{d}-{c}"], "unlearn") for d in DEPTHS for c in SCALES}
    return min(sums.values()) < 0 < max(sums.values()), f"sums: {listed(sums)}"


@observation("4.3, C.3")
def rmu_mirrors(records: Records) -> Checked:
    """RMU's retaining G-effect mirrors its unlearning one.

    they correlate above 0.9 at every depth (c = 5).
    """
    runs = {depth: records[f"rmu-{depth}-5"] for depth in DEPTHS}
    correlations = {
        d: float(pearsonr(*(totals(run, metric) for metric in METRICS)).statistic) for d, run in runs.items()
    }
    return min(correlations.values()) > 0.9, f"correlation: {listed(correlations)}"


@observation("1, 4.4")
def all_compromise(records: Records) -> Checked:
    """Without regularisation every objective compromises retention.

    the retaining G-effects sum up below 0 in every one of them.
    """
    sums = {f"{label}:": summed(records[name], "retain") for label, name in FORGETS.items()}
    return max(sums.values()) < 0, f"sums: {listed(sums)}"


@observation("4.4")
def kl_above_gd(records: Records) -> Checked:
    """GD and KL both retain, KL more strongly.

    both terms' retaining G-effects sum up above 0, KL's higher.
    """
    alone = {name: math.fsum(retaining(records, f"npo+{name}")) for name in ("gd", "kl")}
    whole = {name: summed(records[name], "retain") for name in ("npo-0.5", "npo+gd", "npo+kl", "npo+rr")}
    risk = {name: series(records[name], "nll", "retain")[1][-1] for name in whole}
    return alone["kl"] > alone["gd"] > 0, (
        f"sums of the term alone: {listed(alone)}; of the whole objective: {listed(whole)}; "
        f"retain risk at the end: {listed(risk)}"
    )


@observation("4.4")
def rr_unstable(records: Records) -> Checked:
    """RR does not serve: its G-effect is unstable.

    RR's retaining G-effect (with NPO) changes sign more often than KL's and GD's, and varies more around its mean.
    """
    changes, swing = {}, {}
    for name in ("gd", "kl", "rr"):
        values = retaining(records, f"npo+{name}")
        signs = [value > 0 for value in values if value]
        changes[name] = float(sum(a != b for a, b in pairwise(signs)))
        mean = math.fsum(values) / len(values)
        swing[name] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) / abs(mean)
    holds = all(each["rr"] > max(each["gd"], each["kl"]) for each in (changes, swing))
    return holds, f"changes of sign: {listed(changes)}; standard deviation over mean: {listed(swing)}"
