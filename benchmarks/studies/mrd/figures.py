"""The figures of the MRD paper: what each computes, its table in words, and how it is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from matplotlib.figure import Figure

from pyunlearn.metrics import teacher_forced
from pyunlearn.mrd.characteristics import text_characteristics

from .intervals import in_words, interval, rank_correlation, table
from .study import Result, Study

COLOURS = {"ga": "#64748b", "graddiff": "#c2410c", "npo": "#1d4ed8", "po": "#0f766e"}
ARMS = {"shuffle": "#94a3b8", "uniform": "#64748b", "algorithm2": "#c2410c", "inverse": "#1d4ed8"}
NAMES = {"ga": "GA", "graddiff": "GradDiff", "npo": "NPO", "po": "PO", "shuffle": "all in turn", "uniform": "uniform",
         "algorithm2": "MRD", "inverse": "1/MRD"}  # fmt: skip
SIGMAS = (1e-5, 2e-5, 3e-5, 4e-5)
DRAWS = (1, 2, 5, 10, 20, 50, 100, 200)
STOP = {"ngram": 10, "share": 0.5}


def difficulty(study: Study) -> tuple[Result, str, Figure]:
    """Every forget sample on its own: updates until it is forgotten, and how far the weights went, against MRD."""
    start = study.start(0)
    items = start.forget[: study.args.samples]
    first, second = start.mrd(items), start.mrd(items, "hutchinson", num_draws=8 if study.small else 50)
    read = teacher_forced(start.model, start.rows(items), progress=False)
    x = {
        "MRD (Algorithm 1)": first.value.tolist(),
        "MRD a token": (first.value / first.num_tokens).tolist(),
        "MRD (Definition 3.1)": second.value.tolist(),
        "scored tokens": first.num_tokens.tolist(),
        "negative log-likelihood": [row["nll"] for row in read],
    }
    result: Result = {"x": x, "methods": {}}
    for method in ("ga", "graddiff", "npo"):
        runs = [
            study.run(f"one-{method}-{i:03d}", 0, method, [item], start.retain, steps=study.args.steps,
                      rate=study.args.rate, batch_size=1, forgotten={**STOP, "every_steps": 1})
            for i, item in enumerate(items)
        ]  # fmt: skip
        result["methods"][method] = {
            "updates": [run["steps"] for run in runs],
            "unfinished": sum(run["samples"][0]["forgotten_at"] is None for run in runs),
            "change": [run["mean_absolute_change"] for run in runs],
            "retain": [run["retain"] for run in runs],
        }
    for one in result["methods"].values():
        one["updates_with"] = {name: rank_correlation(values, one["updates"]) for name, values in x.items()}
        one["change_with"] = {name: rank_correlation(values, one["change"]) for name, values in x.items()}
    names = list(result["methods"])
    result["between methods"] = {
        f"{a}, {b}": rank_correlation(result["methods"][a]["updates"], result["methods"][b]["updates"])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex="row")
    for column, (method, one) in enumerate(result["methods"].items()):
        top, bottom = axes[0][column], axes[1][column]
        rho = one["updates_with"]["MRD (Algorithm 1)"]
        top.plot(x["MRD (Algorithm 1)"], one["updates"], "o", color=COLOURS[method], markersize=4)
        top.set(xlabel="MRD (Algorithm 1)", ylabel="updates until forgotten")
        top.set_title(f"{NAMES[method]}: rho = {in_words(rho)}", fontsize=9)
        bottom.plot(sorted(one["change"]), "o", color=COLOURS[method], markersize=3)
        bottom.set(xlabel="samples in order", ylabel="mean absolute change of a weight", ylim=(0, None))
    rows = [[what, *(in_words(result["methods"][method]["updates_with"][what]) for method in names)] for what in x]
    spread = [
        f"{NAMES[method]} {min(one['updates'])} to {max(one['updates'])} updates (not forgotten within "
        f"{study.args.steps}: {one['unfinished']}), mean absolute change {min(one['change']):.2g} to "
        f"{max(one['change']):.2g}"
        for method, one in result["methods"].items()
    ]
    agree = ", ".join(f"{pair} {in_words(rho)}" for pair, rho in result["between methods"].items())
    text = (
        f"{len(items)} samples, each unlearned on its own (AdamW, learning rate {study.args.rate:g}) until its EL "
        f"and MA are below half of the initial means, or for {study.args.steps} updates. The paper expects more "
        "updates where MRD is smaller: a negative rank correlation.\n\n"
        + table(["rank correlation of updates with", *(NAMES[method] for method in names)], rows)
        + f"\n\n{'; '.join(spread)}.\nRank correlation of the updates of two methods: {agree}."
    )
    return result, text, figure


def efficiency(study: Study) -> tuple[Result, str, Figure]:
    """One sample an update until all are forgotten: SGA (uniform) against CGA (by MRD, and by 1 / MRD)."""
    result: Result = {"arms": {}, "of": None}
    for by in ("uniform", "algorithm2", "inverse"):
        runs = []
        for seed in study.seeds:
            start = study.start(seed)
            forget = start.forget[: study.args.samples]
            runs.append(
                study.run(f"all-{by}-{seed}", seed, "sga", forget, start.retain, steps=15 * len(forget),
                          rate=study.args.rate, batch_size=1, by=by, forgotten={**STOP, "every_steps": 2})
            )  # fmt: skip
        result["of"] = len(runs[0]["samples"])
        result["arms"][by] = {
            "steps": [run["steps"] for run in runs],
            "forgotten_at": [[sample["forgotten_at"] for sample in run["samples"]] for run in runs],
            "scored": [len(run["refreshed_at"]) for run in runs],
            "retain": [run["retain"] for run in runs],
            "change": [run["mean_absolute_change"] for run in runs],
        }
    base = result["arms"]["uniform"]["steps"]
    rows = []
    for by, arm in result["arms"].items():
        arm["steps_interval"] = interval(arm["steps"])
        arm["ratio_interval"] = interval([steps / other for steps, other in zip(arm["steps"], base, strict=True)])
        arm["retain_interval"] = interval([one["probability"] for one in arm["retain"]])
        refreshes = sum(arm["scored"]) / len(arm["scored"])
        name = "SGA" if by == "uniform" else f"CGA, p ~ {NAMES[by]}"
        ratio = "" if by == "uniform" else str(arm["ratio_interval"])
        steps = f"{arm['steps_interval'].mean:.1f} ± {arm['steps_interval'].half:.1f}"
        rows.append([name, steps, ratio, arm["retain_interval"], f"{refreshes:.1f}"])
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for by, arm in result["arms"].items():
        for place, times in enumerate(arm["forgotten_at"]):
            gone = sorted(step for step in times if step is not None)
            label = ("SGA" if by == "uniform" else f"CGA, p ~ {NAMES[by]}") if place == 0 else None
            axes.step([0, *gone], range(len(gone) + 1), where="post", color=ARMS[by], linewidth=1, label=label)
    axes.set(xlabel="updates", ylabel="samples forgotten")
    axes.legend(frameon=False, fontsize=8)
    text = (
        f"Gradient ascent on one sample an update (AdamW, learning rate {study.args.rate:g}) until all "
        f"{result['of']} are forgotten, {len(base)} seeds. The paper's count has CGA need 1/N of SGA's updates; "
        "computing the scores (a backward of all samples left, each time) is not in the updates.\n\n"
        + table(["", "updates", "times SGA's", "retain probability after", "times scored"], rows)
    )
    return result, text, figure


def methods(study: Study) -> tuple[Result, str, Figure]:
    """The same number of steps with and without MRD: what is forgotten and what is kept."""
    arms, names = ("shuffle", "algorithm2", "uniform", "inverse"), ("graddiff", "npo", "po")
    result: Result = {"methods": {method: {by: [] for by in arms} for method in names}}
    for by in arms:
        for seed in study.seeds:
            start = study.start(seed)
            forget = start.forget[: study.args.samples]
            for method in names:
                result["methods"][method][by].append(
                    study.run(f"{method}-{by}-{seed}", seed, method, forget, start.retain,
                              steps=5 * math.ceil(len(forget) / 4), rate=study.args.batch_rate, batch_size=4, by=by)
                )  # fmt: skip
    rows, points = [], {}
    for method, by_arm in result["methods"].items():
        for by, runs in by_arm.items():
            values = {
                "unlearning accuracy": [1 - run["forget"]["memorization_accuracy"] for run in runs],
                "forget probability": [run["forget"]["probability"] for run in runs],
                "retain accuracy": [run["retain"]["memorization_accuracy"] for run in runs],
                "retain probability": [run["retain"]["probability"] for run in runs],
            }
            points[method, by] = {name: interval(value) for name, value in values.items()}
            rows.append([f"{NAMES[method]}, {NAMES[by]}", *points[method, by].values()])
            by_arm[by] = {"values": values, "intervals": points[method, by]}
    paired = []
    for method, by_arm in result["methods"].items():
        for by in ("algorithm2", "inverse"):
            differences = {
                name: interval([a - b for a, b in zip(values, by_arm["shuffle"]["values"][name], strict=True)])
                for name, values in by_arm[by]["values"].items()
            }
            by_arm[by]["minus_shuffle"] = differences
            paired.append([f"{NAMES[method]}, {NAMES[by]} minus all in turn", *differences.values()])
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    for axes, method in zip(figure.subplots(1, 3), result["methods"], strict=True):
        for by in arms:
            x, y = (points[method, by][name] for name in ("unlearning accuracy", "retain accuracy"))
            axes.errorbar(x.mean, y.mean, y.half, x.half, "o", color=ARMS[by], capsize=2, label=NAMES[by])
        axes.set(xlabel="unlearning accuracy (1 - MA)", ylabel="retain accuracy (MA)")
        axes.set_title(NAMES[method])
        axes.legend(frameon=False, fontsize=7)
    head = ["", "unlearning accuracy", "forget probability", "retain accuracy", "retain probability"]
    text = (
        f"{len(forget)} forget samples, 5 epochs, batches of 4, AdamW at {study.args.batch_rate:g}, constant; "
        f"{len(study.seeds)} seeds; scores anew "
        "every 10 steps. Unlearning accuracy is 1 - memorization accuracy.\n\n"
        + table(head, rows)
        + "\n\nPaired by seed:\n\n"
        + table(head, paired)
    )
    return result, text, figure


def sensitivity(study: Study) -> tuple[Result, str, Figure]:
    """MRD by Algorithm 1 against sigma (100 draws), and its error and order against the number of draws."""
    start = study.start(0)
    items = start.forget[: study.args.samples or 20]
    most = 20 if study.small else DRAWS[-1]

    def compute() -> Result:
        draws = start.mrd(items, "algorithm1", num_draws=most).draws
        assert draws is not None
        exact = start.mrd(items).value
        by_sigma = {
            f"{sigma:g}": start.mrd(items, "algorithm1", num_draws=min(100, most), sigma=sigma).value.tolist()
            for sigma in SIGMAS
        }
        running = draws.abs().cumsum(0) / torch.arange(1, most + 1)[:, None]
        counts = [k for k in DRAWS if k <= most]
        return {
            "sigma": by_sigma,
            "exact": exact.tolist(),
            "draws": counts,
            "running": running.tolist(),
            "relative_error": [float((running[k - 1] / exact - 1).square().mean().sqrt()) for k in counts],
            "rho": [rank_correlation(running[k - 1].tolist(), exact.tolist()) for k in counts],
        }

    result = start.store.compute("sensitivity", {"samples": len(items), "draws": most}, compute)
    ratios = {
        sigma: interval([a / b for a, b in zip(values, result["sigma"][f"{SIGMAS[0]:g}"], strict=True)])
        for sigma, values in result["sigma"].items()
    }
    result["ratio to the first sigma"] = ratios
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i in range(len(items)):
        left.plot(SIGMAS, [values[i] for values in result["sigma"].values()], color="#94a3b8", linewidth=0.8)
    left.set(xlabel="sigma", ylabel="MRD (Algorithm 1)", ylim=(0, None))
    running = torch.tensor(result["running"]) / torch.tensor(result["exact"])
    right.plot(range(1, most + 1), running, color="#94a3b8", linewidth=0.6)
    right.axhline(1, color="#c2410c", linewidth=1)
    right.set(xscale="log", xlabel="draws K", ylabel="MRD, of its leading order", ylim=(0, 2.5))
    rows = [
        [k, f"{error:.1%}", in_words(rho)]
        for k, error, rho in zip(result["draws"], result["relative_error"], result["rho"], strict=True)
    ]
    text = (
        f"{len(items)} samples. In proportion to sigma: "
        + ", ".join(f"{float(sigma):g} gives {ratio} times" for sigma, ratio in ratios.items())
        + " the first. (The paper's Figure 5a has MRD not depend on sigma, which is what rounding does.)\n\n"
        + table(["draws", "relative error, rms", "rank correlation with the leading order"], rows)
    )
    return result, text, figure


def choice(study: Study) -> tuple[Result, str, Figure]:
    """GradDiff and NPO on other forget sets, single samples and groups, until they are forgotten: what is kept."""
    start, args = study.start(0), study.args
    known = start.forget + start.retain[: len(start.forget) * 9]
    choose, result = random.Random(0), Result()
    size = min(10, len(start.forget))
    for kind, count, of in (("single", 5 if study.small else 12, 1), ("group", 3 if study.small else 10, size)):
        sets = [choose.sample(range(len(known)), of) for _ in range(count)]
        result[kind] = {"sets": sets, "mrd": [], "graddiff": [], "npo": []}
        for place, chosen in enumerate(sets):
            forget = [known[i] for i in chosen]
            retain = [item for i, item in enumerate(known) if i not in chosen]
            result[kind]["mrd"].append(float(start.mrd(forget).value.mean()))
            for method in ("graddiff", "npo"):
                run = study.run(
                    f"choice-{kind}-{method}-{place:02d}", 0, method, forget, retain,
                    steps=args.steps, rate=args.rate if of == 1 else args.batch_rate,
                    batch_size=min(4, of),
                    forgotten={**STOP, "every_steps": 1},
                )  # fmt: skip
                left = sum(sample["forgotten_at"] is None for sample in run["samples"])
                result[kind][method].append({"steps": run["steps"], "not forgotten": left, **run["retain"]})
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    rows = []
    for axes, (kind, one) in zip(figure.subplots(1, 2), result.items(), strict=True):
        retained = {method: [run["probability"] for run in one[method]] for method in ("graddiff", "npo")}
        differences = [a - b for a, b in zip(retained["npo"], retained["graddiff"], strict=True)]
        usual = math.copysign(1, sum(differences))
        one["npo minus graddiff"] = interval(differences)
        one["unfinished"] = {method: sum(run["not forgotten"] > 0 for run in one[method]) for method in retained}
        one["reversed"] = sum(difference * usual < 0 for difference in differences)
        one["spread"] = {method: float(torch.tensor(values).std()) for method, values in retained.items()}
        one["with_mrd"] = {method: rank_correlation(one["mrd"], values) for method, values in retained.items()}
        for method, values in retained.items():
            axes.plot(values, "o-", color=COLOURS[method], markersize=4, linewidth=0.8, label=NAMES[method])
        axes.set(xlabel="forget set", ylabel="retain probability after")
        axes.set_title("one sample" if kind == "single" else f"groups of {size}")
        axes.legend(frameon=False, fontsize=8)
        rows.append(
            [kind, len(differences), *(interval(values) for values in retained.values()),
             *(f"{spread:.3f}" for spread in one["spread"].values()), one["npo minus graddiff"], one["reversed"],
             *one["unfinished"].values()]
        )  # fmt: skip
    head = ["", "sets", "GradDiff", "NPO", "its spread over sets: GradDiff", "NPO", "NPO - GradDiff", "reversed",
            "unfinished: GradDiff", "NPO"]  # fmt: skip
    text = (
        "Forget sets drawn at random from all samples, each unlearned until its samples' EL and MA are below half of "
        f"the initial means, or for {args.steps} steps (unfinished); the probability of up to 100 retain samples after "
        "it. Reversed: sets on which the method that is worse on average is better. A method that did not finish has "
        "kept more by having forgotten less.\n\n" + table(head, rows)
    )
    return result, text, figure


def characteristics(study: Study) -> tuple[Result, str, Figure]:
    """Mean MRD of samples above and below a threshold, for what the paper holds responsible for it."""
    start = study.start(0)
    items = (start.forget + start.retain)[: None if not study.small else 8 * study.args.samples]
    scores = start.mrd(items)
    read = teacher_forced(start.model, start.rows(items), progress=False)
    text_values = text_characteristics([f"{item.question} {item.answer}" for item in items])
    columns: dict[str, list[float]] = {
        name: [row[name] for row in text_values]
        for name in ("lexical_diversity", "sentence_length", "word_frequency", "rare_words")
    }
    columns |= {name: [float(row[name]) for row in read] for name in ("probability", "num_tokens")}
    mrd, each = scores.value.tolist(), (scores.value / scores.num_tokens).tolist()
    result: Result = {"samples": len(items), "mrd": mrd, "characteristics": {}}
    rows, figure = [], Figure(figsize=(9.6, 5.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(2, 3).flat, columns.items(), strict=True):
        upper = name in ("lexical_diversity", "sentence_length")
        ordered = torch.tensor(values, dtype=torch.float64)
        limit = float(ordered.quantile(0.75)) if upper else float(ordered.mean())
        high = [score for score, value in zip(mrd, values, strict=True) if value > limit]
        low = [score for score, value in zip(mrd, values, strict=True) if value <= limit]
        one: Result = {
            "values": values, "threshold": limit, "high": interval(high), "low": interval(low),
            "rho": rank_correlation(values, mrd), "rho_a_token": rank_correlation(values, each),
        }  # fmt: skip
        result["characteristics"][name] = one
        cells = [
            f"{group.mean:.3g} ± {group.half:.1g} ({len(of)})" for group, of in ((one["high"], high), (one["low"], low))
        ]
        rows.append(
            [name.replace("_", " "), f"> {limit:.3g}", *cells, in_words(one["rho"]), in_words(one["rho_a_token"])]
        )
        axes.plot(values, mrd, "o", color="#c2410c", markersize=2, alpha=0.5, rasterized=True)
        axes.axvline(limit, color="#94a3b8", linewidth=1)
        axes.set(xlabel=name.replace("_", " "), ylabel="MRD", yscale="log")
    text = (
        f"{len(items)} samples, MRD of Algorithm 1 to leading order. High: above the upper quartile (lexical "
        "diversity, words a sentence), else above the mean. MRD is a sum over tokens, so longer answers have more.\n\n"
        + table(
            ["", "high is", "mean MRD, high (samples)", "low", "rank correlation with MRD", "with MRD a token"], rows
        )
    )
    return result, text, figure


FIGURES: dict[str, Callable[[Study], tuple[Result, str, Figure]]] = {
    function.__name__: function for function in (sensitivity, characteristics, difficulty, efficiency, choice, methods)
}
