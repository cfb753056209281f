"""The study at a tiny size, and its sentences on cells of known numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.studies.closer_look.cells import METRICS, Cell
from benchmarks.studies.closer_look.numbers import World
from benchmarks.studies.methods import __main__ as command
from benchmarks.studies.methods.claims import claims
from benchmarks.studies.methods.numbers import BY_NAME, CRU, GROUPS, NUMBERS, Study
from benchmarks.studies.methods.page import page
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.grid import load_grid, make_cells

SHORT = ["memorise.epochs=1", "unlearn.max_steps=1", "unlearn.warmup=0", "evaluate.retain_limit=3",
         "evaluate.max_new_tokens=4"]  # fmt: skip


def test_every_method_of_a_sweep_is_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FEW", ("ga", "idk_ap"))
    words = ["--small", "--seeds", "2", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    words += [word for each in SHORT for word in ("--set", each)]
    command.main(words)
    told = json.loads((tmp_path / "out/methods/embedded.json").read_text())
    assert list(told["a of UWC"]) == ["ga", "idk_ap"]
    assert set(told["components of CRU"]) <= {"ga"}  # where it has forgotten
    assert told["reliability"] == []  # of two models
    assert all(len(own) == 2 and all(0 <= a <= 1 for a in own) for own in told["a of UWC"].values())
    mixed = [f"{name} + UWC" for name, own in told["a of UWC"].items() if min(own) < 1]
    mixed += [f"{name} + CRU" for name in told["components of CRU"]]
    assert list(told["numbers"]) == ["before", "retrained", "ga", "idk_ap", *mixed]
    for own in told["numbers"].values():
        assert list(own) == [number.name for number in NUMBERS]
        assert all(len(number["seeds"]) == 2 for number in own.values())
    text = (tmp_path / "out/methods/embedded.md").read_text()
    assert "over 2 seeds (Student's t)" in text
    assert text.count("| ga |") == 3  # the tutorial's table, numbers, answers
    assert "How much of its unlearning each method may keep (a of UWC, the mean over seeds): ga " in text
    assert "hold.** GA collapses" in text or "**Holds.** GA collapses" in text
    assert (tmp_path / "work/embedded-small/compare.csv").is_file()
    with pytest.raises(SystemExit):
        command.main(["embeded"])
    assert "world='embeded': did you mean embedded" in capsys.readouterr().err


def test_the_main_methods_on_smollm2_are_runs(monkeypatch):
    monkeypatch.setattr("pyunlearn.runs.grid.check_fits", lambda config: None)  # the model and TOFU need not be here
    cells = make_cells(load_grid(command.WORLDS["smollm2_tofu"]), "out")
    own = {cell.name: cell.config.unlearn for cell in cells}
    assert len(cells) == len(own) == 9
    assert own["wga_kl"].forget[0].options == {"alpha": 5.0}
    assert own["wtnpo_kl"].forget[0].options == {"alpha": 1.5, "beta": 5.0}
    for name in ("po-retain-kl", "rmu-retain-kl"):
        assert [term.name for term in own[name].retain] == ["kl"]
    assert own["npo_kl"].forget[0].options == {"beta": 0.5}


def study_of(left, refused=(), layered=(), least=()):
    """left: method -> (of the forget set, of what is kept, fluency, extraction strength). layered: methods whose CRU is
    in `left`. least: of metrics, their smallest r."""

    def cell(forget, kept, fluent, strength):
        def values(level):
            own = dict.fromkeys(METRICS, [level] * 10) | {"truth_ratio": [0.5] * 10}
            return own | {"fluency": [fluent] * 10, "extraction_strength": [strength] * 10, "token_entropy": [0.9] * 10}

        return Cell({"forget": values(forget), "retain": values(kept), "holdout": values(kept)}, ["said"] * 2, {})

    left = {"before": (0.9, 0.9, 1.0, 0.8), "retrained": (0.2, 0.9, 1.0, 0.1), **left}
    world = World("known", {name: [cell(*own)] for name, own in left.items()}, ["one?", "two?"])
    methods = [name for name in left if name not in ("before", "retrained") and not name.endswith(CRU)]
    config = RunConfig.model_validate({})
    shares = {name: [dict(refused).get(name, 0.0)] for name in methods}
    correlations = [
        {"attack": attack, "metric": metric, "set": which, "r": None if r is None else min(1.0, r + more),
         "low": None, "high": None, "count": 12}
        for metric, r in dict(least).items() for which in ("forget", "retain")
        for attack, more in (("jailbreak", 0.1), ("relearning", 0.0))
    ]  # fmt: skip
    return Study(
        {name: [config] for name in methods}, [world], shares, {}, {name: ["2 of 5"] for name in layered}, correlations
    )


def thrice(study):
    """Three seeds that say the same."""
    return replace(study, worlds=3 * study.worlds)


def test_conclusions_are_said_either_way():
    good, gone = (0.2, 0.88, 1.0, 0.1), (0.0, 0.01, 0.0, 0.0)
    middle, known = (0.4, 0.7, 0.9, 0.3), (0.85, 0.89, 1.0, 0.7)
    as_in_papers = {"me_gd": good, "ga": gone, "idk_gd": known, "idk_ap": known, "wga_kl": good, "tnpo_kl": good,
                    "wtnpo_kl": good, "ga_kl": gone, "npo_kl": middle, "ga_kl-temperature-2": middle,
                    "npo_kl-temperature-2": good, "ga_kl-keep-0.8": (0.0, 0.0, 0.0, 0.0),
                    "npo_kl-keep-0.8": (0.45, 0.7, 0.9, 0.3), "bst": good,
                    "npo": middle, "npo-retain-none": gone, "ga_kl-coefficient-10.0": middle,
                    "ga + CRU": (0.2, 0.89, 1.0, 0.1), "npo-retain-none + CRU": good}  # fmt: skip
    least = {"extraction_strength": 0.9, "probability": 0.5, "rouge_l": None}
    lines = claims(thrice(study_of(as_in_papers, {"idk_gd": 0.8, "idk_ap": 0.04}.items(), GROUPS, least.items())))
    assert [line.startswith("**Holds.**") for line in lines] == [True] * 10
    assert "the least r: extraction_strength 0.900, probability 0.500, rouge_l -1.000" in lines[8]
    assert "idk_ap 0.040, idk_gd 0.800" in lines[1]
    best = (0.1, 0.89, 1.0, 0.05)
    otherwise = {"me_gd": middle, "ga": good, "idk_gd": good, "idk_ap": good, "wga_kl": middle, "tnpo_kl": good,
                 "wtnpo_kl": good, "ga_kl": gone, "npo_kl": good, "ga_kl-temperature-2": middle,
                 "npo_kl-temperature-2": middle, "ga_kl-keep-0.8": middle, "npo_kl-keep-0.8": best,
                 "bst": middle, "npo": good, "npo-retain-none": gone, "ga_kl-coefficient-10.0": best,
                 "ga + CRU": good, "npo-retain-none + CRU": best}  # fmt: skip
    least = {"extraction_strength": 0.5, "probability": 0.9}
    lines = claims(thrice(study_of(otherwise, {"idk_gd": 0.8, "idk_ap": 0.06}.items(), GROUPS, least.items())))
    assert [line.startswith("**Does not hold.**") for line in lines] == [True] * 10
    assert claims(study_of({"sga": good})) == ["None of the methods that they are about is here."]
    assert len(claims(study_of({"me_gd-coefficient-0.1": good}))) == 1  # of a recipe with options
    text = page(study_of({"ga": gone}), "embedded")
    assert "bootstrap intervals" in text
    assert "none by any" in text
    assert "Not measured: no attacks were asked for" in text
    text = page(study_of({"ga": gone, "ga + CRU": good}, layered=("ga",), least=least.items()), "embedded")
    assert "What CRU takes from the unlearned model: ga: 2 of 5." in text
    assert text.count("| ga + CRU |") == 3  # the tutorial's table, all numbers, answers
    assert "| extraction strength, forget | 0.600 | 0.500 |" in text
    assert "over the 12 models of the first seed" in text


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((0.1, 0.11, 0.12), "Holds"),
        ((-0.1, -0.11, -0.12), "Does not hold"),
        ((0.1, -0.1, 0.02), "Open, the interval"),
        ((0.1,), "Open, of what decides it one seed gives no interval"),
    ],
)
def test_what_seeds_leave_open_is_said(gains, word):
    """BS-T against NPO, more and less apart than the seeds are."""

    def world(gain):
        return study_of({"bst": (0.3, 0.5 + gain, 1.0, 0.1), "npo": (0.3 + gain, 0.5, 1.0, 0.1)}).worlds[0]

    one = study_of({"bst": (0.3, 0.5, 1.0, 0.1), "npo": (0.4, 0.5, 1.0, 0.1)})
    (line,) = claims(replace(one, worlds=[world(gain) for gain in gains]))
    assert line.startswith(f"**{word}")
    assert "npo - bst" in line


def test_over_seeds_students_interval():
    study = study_of({"ga": (0.1, 0.5, 1.0, 0.1)})
    one = BY_NAME["forget probability"].get(study, "ga")
    assert (one.mean, one.num_samples) == (pytest.approx(0.1), 10)  # of one seed, over its samples
    several = study.over_seeds([0.1, 0.2, 0.3])
    assert several.mean == pytest.approx(0.2)
    assert several.high - several.mean == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-5)
