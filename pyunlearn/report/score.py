"""The report of `pyunlearn score`: one HTML page with inline SVG, in the style of a run's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from markupsafe import Markup
from scipy.stats import spearmanr

from ..mrd import MRDResult
from .figures import COLOURS, STYLE, new_figure, render, to_panels

Records = Sequence[Mapping[str, Any]]
# record key -> what it is called
CHARACTERISTICS = {
    "probability": "probability a token",
    "num_tokens": "scored tokens",
    "lexical_diversity": "lexical diversity",
    "sentence_length": "words a sentence",
    "word_frequency": "word frequency (log2)",
    "rare_words": "rare words",
}
BLUE, GREY = "#1d4ed8", "#94a3b8"
BANDS = {COLOURS["retain"]: "--", GREY: "-."}  # dashes of curves, solid the others
RATIO_TOLERANCE = 0.1  # of the expected ratio
NOISE_LIMIT = 0.05  # rounding, of a draw's statistic
FOLLOWS_LENGTH = 0.5  # rank correlation from which the lengths are most of the order
KNOWS_NOTHING = 0.9  # of what a uniform guess costs a token: a model from there on knows next to nothing of the rows
NOISE_OF_ORDER = 0.1  # squared errors, of the scores' variance: from there on neighbours are not told apart
EXTREMES = 6


def scored_part(diagnostics: Mapping[str, Any]) -> str:
    """What is said after the samples: which of their tokens are scored, where that is not the answers alone."""
    return ", questions and answers" if diagnostics.get("labels") == "all" else ""


def self_checks(diagnostics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"text", "met"} of what the diagnostics of `mrd` let one check."""
    checks = []
    if (ratio := diagnostics["sigma_ratio"]) is not None:
        expected = diagnostics["expected_ratio"]
        met = abs(ratio / expected - 1) <= RATIO_TOLERANCE
        check = {"text": f"twice the sigma gives {ratio:.3f} times the score, expected {expected:g}", "met": met}
        rounded = (diagnostics["noise_share"] or 0) > NOISE_LIMIT  # said by a check of its own
        checks.append(check if met or rounded else with_sigma(check, diagnostics, "it shakes too much", 0.1))
    if (share := diagnostics["noise_share"]) is not None:
        check = {"text": f"rounding is {share:.2%} of a draw's statistic", "met": share <= NOISE_LIMIT}
        checks.append(check if check["met"] else with_sigma(check, diagnostics, "it shakes too little", 10))
    if diagnostics["estimator"] == "gradient":
        share = diagnostics["share_linear_ok"]
        text = f"{share:.0%} of the samples are within about 1 % of Algorithm 1 (sigma ||g|| <= 0.1)"
        check = {"text": text, "met": share == 1}
        checks.append(check if check["met"] else with_sigma(check, diagnostics, "others are not", 0.1))
    if (share := diagnostics["by_heart_share"]) is not None:
        checks.append(
            {"text": f"{share:.1%} of the change is in tokens known by heart (L < 1e-6)", "met": share <= 0.5}
        )
    if (nll := diagnostics.get("nll_a_token")) is not None:
        guess = diagnostics["uniform_nll"]
        if nll >= KNOWS_NOTHING * guess:
            text = (
                f"the model knows next to nothing of these rows: {nll:.2f} nats a token, a uniform guess has "
                f"{guess:.2f}; there is nothing to unlearn, so score a model that has learned them"
            )
            checks.append({"text": text, "met": False})
    return checks


def with_sigma(check: dict[str, Any], diagnostics: Mapping[str, Any], why: str, factor: float) -> dict[str, Any]:
    """The check with the command that has another sigma; `definition` is measured at one of its own."""
    if diagnostics["estimator"] == "definition":
        return check
    command = with_option(diagnostics["made"]["command"], "sigma", f"{diagnostics['sigma'] * factor:g}")
    return {**check, "text": f"{check['text']}: {why}; with another sigma:", "command": command}


def ordered(records: Records) -> bool:
    """Whether the scores differ by more than their errors, so that there is a hardest one."""
    noise = noise_of_order(records)
    return noise is None or noise < 1


def all_checks(records: Records, diagnostics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`self_checks`, and whether the scores are those of the samples' lengths, with the command for others if so."""
    rho = rank_correlation([record["num_tokens"] for record in records], [record["mrd"] for record in records])
    checks = self_checks(diagnostics)
    if (noise := noise_of_order(records)) is not None:
        met = noise <= NOISE_OF_ORDER
        check: dict[str, Any] = {"text": f"noise is up to {noise:.1%} of how the scores differ", "met": met}
        if not met:
            draws = diagnostics["num_draws"] * math.ceil(noise / NOISE_OF_ORDER)
            told = "neighbours in the order are" if ordered(records) else "samples are"
            check["text"] += f": {told} not told apart; with more draws:"
            check["command"] = with_option(diagnostics["made"]["command"], "num-draws", draws)
        checks.append(check)
    if rho is not None:
        per_token, follows = diagnostics["normalize"] == "tokens", abs(rho) >= FOLLOWS_LENGTH
        what, told = "MRD a token" if per_token else "MRD", "follows" if follows else "does not follow"
        check = {
            "text": f"{what} {told} the number of scored tokens: ρ = {rho:.2f} (Spearman's)",
            "met": not follows,
        }
        if follows and not per_token:
            check["text"] += "; for scores a token, of the same draws:"
            check["command"] = f"{diagnostics['made']['command']} --per-token"
        checks.append(check)
    return checks


def noise_of_order(records: Records) -> float | None:
    """The mean squared standard error over the variance of the scores; None without errors or differences.

    An upper bound for the order: samples share their draws, so that part of the error is all of theirs."""
    values = torch.tensor([record["mrd"] for record in records], dtype=torch.float64)
    errors = [record["standard_error"] for record in records]
    if None in errors or not any(errors) or len(errors) < 2 or not (spread := float(values.var())) > 0:
        return None
    return float(torch.tensor(errors, dtype=torch.float64).square().mean()) / spread


def with_option(command: str, name: str, value: object) -> str:
    """
    >>> with_option("pyunlearn score x.yaml --num-draws 20", "num-draws", 80)
    'pyunlearn score x.yaml --num-draws 80'
    """
    own = re.sub(rf" --{name}[ =]\S+", "", command)
    return f"{own} --{name} {value}"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None where one of them does not vary."""
    return float(spearmanr(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else None


def render_score_report(records: Records, result: MRDResult, made: Mapping[str, str]) -> str:
    """The page. made: how, see `runs.provenance.describe`; the result's diagnostics hold more of it."""
    diagnostics = result.diagnostics
    ranked = sorted(records, key=lambda record: record["mrd"])
    count = min(EXTREMES, (len(ranked) + 1) // 2)
    ends = (
        [f"{end} to unlearn" for end in ("Hardest", "Easiest")]
        if ordered(records)
        else ["Lowest scores", "Highest scores"]
    )
    with matplotlib.rc_context(STYLE):
        figures = {
            "distribution_svg": distribution_figure(ranked),
            "convergence_svg": None if result.draws is None else convergence_figure(result),
            "sigma_svg": None if diagnostics["noise_share"] is None else sigma_figure(diagnostics),
            "characteristics_svg": characteristics_figure(records),
        }
    return render(
        "score.html",
        diagnostics=diagnostics,
        part=scored_part(diagnostics) or " of the answers",
        checks=all_checks(records, diagnostics),
        extremes=dict(zip(ends, (ranked[:count], ranked[::-1][:count]), strict=True)),
        made=made,
        diagnostics_text=json.dumps(diagnostics, indent=1),
        **figures,
    )


def distribution_figure(ranked: Records) -> Markup:
    """Histogram, and every sample with an error bar, hardest first."""
    figure = new_figure(1, 2)
    left, right = figure.axes
    values = [record["mrd"] for record in ranked]
    left.hist(values, bins=min(30, max(5, len(values) // 3)), color=BLUE, alpha=0.7)
    left.ticklabel_format(axis="x", scilimits=(-2, 3))
    left.set(xlabel="MRD", ylabel="samples")
    errors = [record["standard_error"] or 0.0 for record in ranked]
    right.errorbar(range(len(values)), values, errors, fmt="o", markersize=2.5, color=BLUE, ecolor=GREY, elinewidth=0.8)
    right.set(xlabel="sample, hardest first", ylabel="MRD")
    plain_numbers(figure)
    data = [{key: record[key] for key in ("index", "mrd", "standard_error")} for record in ranked]
    return to_panels(figure, "distribution of MRD", data)


def plain_numbers(figure: Any) -> None:
    """MRD is small: its power of ten goes to the end of the axis."""
    for axes in figure.axes:
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def running(draws: torch.Tensor, absolute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, n) draws -> the estimate after 2 .. K of them and its standard error, (K - 1, n) each."""
    x = draws.abs() if absolute else draws
    count = torch.arange(1, len(x) + 1, dtype=x.dtype).unsqueeze(1)
    mean = x.cumsum(0) / count
    spread = ((x - x.mean(0)).square().cumsum(0) / count - (mean - x.mean(0)).square()).clamp_min(0)
    error = (spread / (count - 1).clamp_min(1)).sqrt()
    return (mean if absolute else mean.abs())[1:], error[1:]


def convergence_figure(result: MRDResult) -> Markup:
    """The running estimate with its standard error: the mean over samples, and three samples."""
    draws, diagnostics = result.draws, result.diagnostics
    assert draws is not None
    absolute = diagnostics["estimator"] in ("algorithm1", "initial")
    plain = (draws.abs() if absolute else draws).mean(0).abs()
    scale = torch.where(plain > 0, result.value / plain, 0.0)  # to sigma, and by tokens where asked for
    order = result.value.argsort()
    figure = new_figure(1, 2)
    everything, three = figure.axes
    together = (draws.abs() if absolute else draws * draws.mean(0).sign()) * scale
    curves = [("mean of all samples", everything, BLUE, running(together.mean(1, keepdim=True), False), 1.0)]
    picks = {"easiest": order[-1], "middle": order[len(order) // 2], "hardest": order[0]}
    for (name, i), colour in zip(picks.items(), (COLOURS["retain"], GREY, COLOURS["forget"]), strict=True):
        curves.append((name, three, colour, running(draws[:, i : i + 1], absolute), float(scale[i])))
    x, data = range(2, len(draws) + 1), []
    for name, axes, colour, (means, errors), factor in curves:
        mean, error = (means[:, 0] * factor).tolist(), (errors[:, 0] * factor).tolist()
        band(axes, x, mean, error, colour, name)
        columns = ("samples", "draws", "mrd", "standard_error")
        data += [dict(zip(columns, (name, *row), strict=True)) for row in zip(x, mean, error, strict=True)]
    for axes in figure.axes:
        axes.set(xlabel="draws", ylabel="MRD")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    plain_numbers(figure)
    return to_panels(figure, "MRD by number of draws", data)


def band(axes: Any, x: range, mean: list[float], error: list[float], colour: str, name: str) -> None:
    low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, BANDS.get(colour, "-"), color=colour, linewidth=1.4, label=name)


def sigma_figure(diagnostics: Mapping[str, Any]) -> Markup:
    """A draw's statistic at sigma / 1024, sigma and 2 sigma, relative to that at sigma, beside the law it must obey."""
    figure = new_figure(1, 1)
    (axes,) = figure.axes
    order = math.log2(diagnostics["expected_ratio"])
    steps = [1 / 1024, 1.0, 2.0]
    axes.plot(steps, [step**order for step in steps], color=GREY, linewidth=1)
    measured = [diagnostics["noise_share"], 1.0, diagnostics["sigma_ratio"]]
    axes.plot(steps, measured, "o", color=BLUE)
    axes.set(xscale="log", yscale="log", xlabel="sigma, relative", ylabel="statistic, relative")
    data = [
        {"sigma": diagnostics["sigma"] * step, "statistic": value} for step, value in zip(steps, measured, strict=True)
    ]
    return to_panels(figure, "MRD by sigma", data)


def characteristics_figure(records: Records) -> Markup:
    """A box plot of MRD for the thirds of each characteristic."""
    figure = new_figure(2, 3)
    values = [record["mrd"] for record in records]
    for axes, (key, name) in zip(figure.axes, CHARACTERISTICS.items(), strict=True):
        x = [record[key] for record in records]
        axes.boxplot(
            thirds(x, values), tick_labels=["low", "middle", "high"], widths=0.5, patch_artist=True,
            boxprops={"facecolor": "#dbeafe", "edgecolor": BLUE}, medianprops={"color": BLUE},
            flierprops={"markersize": 3, "markeredgecolor": GREY},
        )  # fmt: skip
        rho = rank_correlation(x, values)
        axes.set_title(name if rho is None else f"{name}, ρ = {rho:.2f}")
        axes.set_ylabel("MRD")
    plain_numbers(figure)
    data = [{key: record[key] for key in ("index", "mrd", *CHARACTERISTICS)} for record in records]
    return to_panels(figure, "MRD by characteristic", data)


def thirds(x: Sequence[float], values: Sequence[float]) -> list[list[float]]:
    """The values whose x is up to the lower tercile, between, and above the upper one."""
    ordered = sorted(x)
    low, high = ordered[(len(x) - 1) // 3], ordered[2 * (len(x) - 1) // 3]
    groups: list[list[float]] = [[], [], []]
    for at, value in zip(x, values, strict=True):
        groups[0 if at <= low else 1 if at <= high else 2].append(value)
    return groups
