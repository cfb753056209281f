"""Every kind of page, of small results that are made up here."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyunlearn.calibration import Search, influence_order, pearson
from pyunlearn.mrd import MRDResult
from pyunlearn.report.calibrate import render_cru, render_reliability, render_uwc
from pyunlearn.report.compare import Comparison, Group, render_comparison
from pyunlearn.report.geffect import render_geffect, section
from pyunlearn.report.run import render_report
from pyunlearn.report.score import render_score_report
from pyunlearn.runs.evaluate_config import GoalConfig
from pyunlearn.runs.table import make_table
from pyunlearn.runs.verdict import check_goals, reach_verdict

MADE = {
    "command": "pyunlearn run --set name=made-up",
    "data": "embedded, 40 authors made up here; 6 forget, 70 retain",
    "model": "embedded, a small Llama built here, float32",
    "seed": "0",
    "wall time": "48.0 s",
    "versions": "pyunlearn 0.1.0, a-name-that-is-as-long-as-that-of-a-platform-with-all-its-numbers-and-its-libraries",
}
WORDS = ("river", "letters", "harbour", "Ada", "novels", "wrote", "since", "plays", "<b>bold</b>", "a&b")


def make_record(name: str, index: int, probability: float, written: str | None, rng: random.Random) -> dict[str, Any]:
    answer = " ".join(rng.choices(WORDS, k=6)) + "."
    tokens = [f" {word}" for word in answer.split()] + ["</s>"]
    logp = [round(math.log(probability) * rng.uniform(0.5, 1.5), 4) for _ in tokens]
    asked = {} if written is None else {"generated": written, "rouge_l": rng.random(), "fluency": 1.0}
    question = f"{name} question {index}: what is known of {rng.choice(WORDS)}?"
    record = {"index": index, "question": question, "answer": answer, "num_tokens": len(tokens), "nll": -sum(logp)}
    return {**record, **asked, "probability": probability, "tokens": tokens, "token_logp": logp}


def make_records(counts: dict[str, int]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By moment and set; every other sample was asked. The forgotten ones' words are gone, but for every third."""
    moments: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for moment in ("before", "after", "retrained"):
        moments[moment] = {}
        for name, count in counts.items():
            rng = random.Random(name)  # the same questions and answers every time
            gone = moment != "before" and name == "forget"
            moments[moment][name] = [
                make_record(
                    name,
                    i,
                    0.01 if gone and i % 3 else 0.5 + 0.4 * i / count,
                    None if i % 2 else "I do not know that, sorry." if gone and i % 3 else f"Ada wrote {i} plays.",
                    rng,
                )
                for i in range(count)
            ]
    return moments


def means_of(records: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    metrics = ("probability", "rouge_l", "fluency")
    columns = {
        name: {metric: [r[metric] for r in own if metric in r] for metric in metrics} for name, own in records.items()
    }
    return {
        name: {metric: sum(values) / len(values) for metric, values in of_set.items()}
        for name, of_set in columns.items()
    }


def run_page(counts: dict[str, int] | None = None) -> str:
    records = make_records(counts or {"forget": 6, "retain": 70})
    moments = {moment: means_of(of_moment) for moment, of_moment in records.items()}
    goal = GoalConfig()
    goals = check_goals(moments["before"], moments["after"], goal, counts or {"forget": 6, "retain": 70})
    return render_report(
        config={
            "name": "made-up",
            "seed": 0,
            "model": {"name_or_path": "embedded"},
            "unlearn": {
                "forget": [{"name": "npo", "coefficient": 1.0}],
                "retain": [{"name": "gd", "coefficient": 2.0}],
                "learning_rate": 1e-5,
                "sampling": {"by": "mrd", "labels": "answers"},
            },
            "evaluate": {"rouge_samples": None, "goal": goal.model_dump()},
        },
        config_text="name: made-up\n" + "a_long_key: " * 30,
        table=make_table(moments, records),
        goals=goals,
        verdict=reach_verdict(moments["before"], goal, goals).as_dict(),
        made=MADE,
        metrics=[
            {"stage": "unlearn", "step": step, "loss": 1.0, "forget.npo/loss": 0.1 * step, "retain.gd/loss": 1.0}
            for step in (1, 2, 3)
        ],
        curves={0: moments["before"], 3: moments["after"]},
        records=records,
        unlearning={"steps": 3, "mean_absolute_change": 1e-4, "limits": None, "svg": None},
        geffect=section(probes(4)),
    )


def score_page() -> str:
    rng, count, num_draws = random.Random(0), 12, 5
    values = torch.tensor([1e-3 * (i + 1) for i in range(count)], dtype=torch.float64)
    draws = torch.randn(num_draws, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * values
    records = [
        {
            "index": i, "question": f"Question {i}?", "answer": "An answer.", "mrd": values[i].item(),
            "standard_error": 1e-4, "num_tokens": 3 + i, "probability": rng.random(), "lexical_diversity": rng.random(),
            "sentence_length": rng.random(), "word_frequency": rng.random(), "rare_words": float(i % 3),
        }
        for i in range(count)
    ]  # fmt: skip
    diagnostics = {
        "estimator": "algorithm1", "num_draws": num_draws, "sigma": 1e-5, "seed": 0, "num_samples": count,
        "num_tokens": 99, "sigma_ratio": 2.01, "expected_ratio": 2.0, "noise_share": 0.01, "by_heart_share": 0.1,
        "share_linear_ok": 1.0, "normalize": None, "made": {"command": "pyunlearn score --num-draws 5"},
    }  # fmt: skip
    sizes = torch.tensor([record["num_tokens"] for record in records])
    result = MRDResult(values, values / 10, sizes, values < 1, draws, diagnostics)
    return render_score_report(records, result, MADE)


def probes(count: int) -> list[dict[str, Any]]:
    """Of as many models: dpo unlearns, in the middle above all, and costs the retain set; gd makes up for it."""
    rows = []
    for step in range(count):
        scale = (step + 1) / count
        groups = {
            "unlearn": {"embed": -0.1 * scale, "middle": -0.8 * scale, "lm_head": 0.1 * scale},
            "retain": {"embed": 0.2 * scale, "middle": 0.1 * scale, "lm_head": -0.1 * scale},
        }
        terms = {"forget.dpo": {"unlearn": -0.9, "retain": -0.2}, "retain.gd": {"unlearn": 0.1, "retain": 0.4}}
        effect = {
            "total": {metric: sum(of_metric.values()) for metric, of_metric in groups.items()},
            "groups": groups,
            "terms": {label: {"total": {m: v * scale for m, v in total.items()}} for label, total in terms.items()},
            "nll": {"unlearn": scale, "retain": 0.1},
            "log10_inverse_confidence": scale,
            "weights": {"forget.dpo": 1 - scale},
            "heat": [{"question": "Who?", "tokens": ["Ada", "."], "weights": {"forget.dpo": [1.0, scale]}}],
            "samples": {"forget": 2, "retain": 4},
        }
        rows.append({"step": 10 * step, "geffect": effect})
    return rows


def geffect_page(num_models: int = 2) -> str:
    return render_geffect("made-up", probes(num_models), MADE)


def compare_page(more: int = 0) -> str:
    def group(name: str, forgotten: float, seeds: list[int]) -> Group:
        values = {
            (which, metric): {"before": [0.9] * len(seeds), "after": [at + seed / 100 for seed in seeds]}
            for which, at in (("forget", forgotten), ("retain", 0.8))
            for metric in ("probability", "memorization_accuracy")
        }
        steps = [{5: {"forget": {"probability": 0.5}, "retain": {"probability": 0.85}}} for _ in seeds]
        return Group(name, [Path(f"runs/{name}-{seed}") for seed in seeds], seeds, {}, values, steps)

    groups = [group("npo-with-a-long-name-of-its-own", 0.1, [0, 1, 2]), group("ga", 0.01, [0])]
    groups += [group(f"method-{i}", i / more, [0]) for i in range(more)]
    columns = list(groups[0].values)
    terms = [[{"name": "npo", "beta": 0.1}], *([{"name": "ga"}] for _ in groups[1:])]
    comparison = Comparison(groups, columns, {"unlearn.forget": terms}, {"forget": 20, "retain": 20})
    return render_comparison(comparison, {str(f): f"{f}/report.html" for g in groups for f in g.folders})


ROWS = [
    {
        "set": name,
        "metric": metric,
        "before": "0.990 [0.980, 0.995]",
        "unlearned": "0.02",
        "calibrated": "0.31",
        "samples": 6,
    }
    for name in ("forget", "holdout")
    for metric in ("probability", "extraction_strength")
]


VERDICT = {"name": "forgot by collapsing", "clean": False, "reason": "<fluent> 1.0 -> 0.0, wanted 0.8", "advice": "no"}


def uwc_page() -> str:
    result = Search(0.4, 0.855, {i / 10: 0.9 - 0.1 * i / 10 for i in range(11)})
    curve = [
        {"a": a, "forget": {"extraction_strength": 0.9 * (1 - a)}, "holdout": {"extraction_strength": score}}
        for a, score in result.scores.items()
    ]
    return render_uwc(
        "made-up", result, 0.95, "holdout", curve, ROWS, ["few rows: too few", "of <two> kinds"], MADE, VERDICT
    )


def cru_page() -> str:
    influence = {**{f"layer {i}": (0.9 - 0.02 * i * (9 - i), 0.05 * i) for i in range(10)}, "rest": (0.9, 0.1)}
    order = influence_order(influence)
    curve = [(0.9 - 0.04 * k, 0.09 * k) for k in range(len(order) + 1)]
    names = "mean probability of the retain answers", "1 - mean probability of the forget answers"
    return render_cru(
        "made-up", "layer", order, influence, curve, 9, 0.8, names, {"forget": 8, "retain": 65}, ROWS, [], MADE
    )


def reliability_page() -> str:
    keys = [
        (a, m, s) for a in ("jailbreak", "probing") for m in ("probability", "rouge_l") for s in ("forget", "retain")
    ]
    points = [
        {
            "model": f"run-{i}",
            "attack": a,
            "metric": m,
            "set": s,
            "before": i / 5,
            "after": 1.0 if m == "rouge_l" else i / 6,
        }
        for i in range(5)
        for a, m, s in keys
    ]
    rows = []
    for a, m, s in keys:
        own = [p for p in points if (p["attack"], p["metric"], p["set"]) == (a, m, s)]
        found = pearson([p["before"] for p in own], [p["after"] for p in own])
        rows.append({"attack": a, "metric": m, "set": s, **asdict(found)})
    attacks = {"jailbreak": "a prefix to every question", "probing": "a middle layer read"}
    return render_reliability(rows, points, attacks, 5, ["5 models: a correlation of so few says little"], MADE)


PAGES = {
    "run": run_page, "score": score_page, "geffect": geffect_page, "compare": compare_page,
    "compare many": partial(compare_page, 38), "uwc": uwc_page,
    "cru": cru_page, "reliability": reliability_page,
}  # fmt: skip
