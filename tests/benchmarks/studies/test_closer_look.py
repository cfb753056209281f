"""The study at a tiny size, and its numbers and sentences on cells of known ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies.closer_look import page
from benchmarks.studies.closer_look.__main__ import main
from benchmarks.studies.closer_look.cells import METHODS, METRICS, MODELS, Cell, Start
from benchmarks.studies.closer_look.numbers import BY_NAME, KEPT, SINGLES, World, as_dict
from pyunlearn.metrics import Interval
from pyunlearn.metrics.utility import forget_efficacy, harmonic_mean, memorization

SHORT = [
    "memorise.epochs=1",
    "unlearn.max_steps=1",
    "unlearn.warmup=0",
    "evaluate.retain_limit=3",
    "evaluate.max_new_tokens=4",
]


def test_every_model_under_every_metric_and_nothing_twice(tmp_path, monkeypatch, capsys):
    words = ["--toy", "--seeds", "1", "--embedder", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), *(word for each in SHORT for word in ("--set", each))]
    main(words)
    told = json.loads((tmp_path / "out" / "closer_look" / "embedded.json").read_text())
    keys = {(row["model"], row["set"], row["metric"]) for row in told["means"]}
    assert keys == {(model, name, metric) for model in MODELS for name in ("forget", *KEPT) for metric in METRICS}
    assert all(0 <= row["mean"] <= 1 for row in told["means"])
    text = (tmp_path / "out" / "closer_look" / "embedded.md").read_text()
    tables = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("|")]
    assert all(tables.count(model) >= 5 for model in MODELS)  # numbers, three sets, answers
    assert "there was no embedder" in text
    monkeypatch.setattr(Start, "compute", lambda *_: pytest.fail("all is there"))
    main(words)
    assert (tmp_path / "out" / "closer_look" / "embedded.md").read_text() == text
    with pytest.raises(SystemExit):
        main(["embeded"])
    assert "world='embeded': did you mean embedded" in capsys.readouterr().err


def values_of(probability, rng, ratio=0.5, fluent=1.0, samples=30):
    """Around these means, some metrics the same for all samples."""
    near = np.clip(rng.normal(probability, 0.02, samples), 0, 1).tolist()
    fixed = {"truth_ratio": ratio, "token_entropy": 0.9, "fluency": fluent}
    return {metric: [fixed[metric]] * samples if metric in fixed else near for metric in METRICS}


@pytest.fixture(scope="module")
def world():
    """GA has nothing left anywhere, IDK+AP still knows, ME+GD is where the retrained model is."""
    rng = np.random.default_rng(0)
    left = {"before": (0.9, 0.9), "retrained": (0.2, 0.9), "GA": (0.0, 0.02), "NPO": (0.05, 0.6), "ME+GD": (0.2, 0.85),
            "IDK+AP": (0.5, 0.88)}  # fmt: skip
    cells = {}
    for model, (forget, kept) in left.items():
        sets = {"forget": (forget, 0.9 if model in ("retrained", "ME+GD") else 0.3), "retain": (kept, 0.2)}
        sets["holdout"] = (kept / 2 if model == "NPO" else kept, 0.2)
        values = {name: values_of(p, rng, ratio, float(model != "GA")) for name, (p, ratio) in sets.items()}
        cells[model] = [Cell(values, ["a | b"], {"training": 1.0, "measuring": 2.0}) for _ in range(2)]
    return World("embedded", cells, ["Who?"])


def test_single_numbers_are_those_of_the_metrics(world):
    def mean(metric, name="forget"):
        return float(np.mean(world.cells["NPO"][0].values[name][metric]))

    p, ratio = mean("probability"), 0.3
    # without cosine and entailment: the mean of three
    efficacy = world.efficacy("NPO")
    assert efficacy.mean == pytest.approx(1 - np.mean([p, mean("rouge_l"), 1 - ratio]))
    assert forget_efficacy(p, p, 1 - ratio, p, p) == pytest.approx(1 - (4 * p + 1 - ratio) / 5)
    assert efficacy.low < efficacy.mean < efficacy.high
    kept = [value for name in KEPT for value in (mean("probability", name), mean("rouge_l", name), 0.8, 0.9)]
    utility = world.utility("NPO")
    assert utility.mean == pytest.approx(harmonic_mean(kept))
    assert utility.low < utility.mean < utility.high
    assert utility.num_samples == 120
    assert world.memorised("NPO") == pytest.approx(memorization(p, p, p, 1 / 1.3))
    assert world.distance("retrained") == 0
    assert world.quality("retrained") == 0
    assert world.quality("ME+GD") == 0 > world.quality("NPO")


def test_ranks_go_by_what_is_better(world):
    assert BY_NAME["forget probability"].best(world) == "GA"
    assert BY_NAME["distance to retrained"].best(world) == "ME+GD"
    assert BY_NAME["forget fluency"].ranks(world) == {"GA": 4, "NPO": 1, "ME+GD": 1, "IDK+AP": 1}
    assert BY_NAME["model utility"].ranks(world)["GA"] == 4
    assert page.order({"A": 3, "B": 1, "C": 1}) == "B = C, A"


def test_the_sentences_name_whom_the_numbers_name(world):
    told = page.findings(world)
    assert "GA has the lowest, 0.00" in told[0]
    assert "0.000 [0.000, 0.000] is language" in told[0]
    assert "GA and NPO are below it" in told[1]
    assert "IDK+AP writes 0.49" in told[2]
    assert "nearest to the retrained model's with ME+GD (ln p = 0.0;" in told[4]
    assert told[5].startswith("**Rehearsed rows flatter.** NPO keeps 0.598")
    assert sum(as_dict(world)["singles"]["GA"][single.name] is not None for single in SINGLES) == len(SINGLES)
    assert METHODS.keys() < world.cells.keys()


def test_intervals_apart():
    low, middle, high = Interval(0.1, 0.0, 0.2, 9), Interval(0.2, 0.15, 0.4, 9), Interval(0.6, 0.5, 0.7, 9)
    assert (page.disjoint(low, high), page.disjoint(high, low), page.disjoint(low, middle)) == (-1, 1, 0)
    assert page.disjoint(low, Interval(0.9, None, None, 1)) == 0
