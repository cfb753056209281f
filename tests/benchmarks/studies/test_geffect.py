"""The study of the G-effect runs at a tiny size, and its page says what the records hold."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from benchmarks.results import RESULTS, units
from benchmarks.studies.geffect import runs
from benchmarks.studies.geffect.__main__ import HERE, main
from benchmarks.studies.geffect.figures import FIGURES, write
from benchmarks.studies.geffect.observations import OBSERVATIONS
from benchmarks.studies.geffect.page import write as write_page
from pyunlearn.runs import load_config
from pyunlearn.store import Store

TINY = {
    "model.options": "{tie_word_embeddings: false, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, "
    "num_key_value_heads: 2, vocab_size: 384}",
    "data": "{num_authors: 4, questions_per_author: 2, forget_fraction: 0.25, num_unknown: 0}",
    "memorise": "{epochs: 3, batch_size: 4}",
    "unlearn": "{epochs: 20, batch_size: 2, learning_rate: 1e-3}",
    "geffect": "{every: 4, forget_samples: 2, retain_samples: 2, batch_size: 2}",
    "evaluate.retain_limit": 2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Words of the command, the folder of its results, and one for its runs."""
    folder = tmp_path_factory.mktemp("study")
    changes = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return [*changes, "--out", str(folder / "out"), "--work", str(folder / "work")], folder / "out"


def test_figures_draw_what_the_runs_left(study, monkeypatch):
    words, out = study
    main(["fig10", "heat", *words])
    kept = units(out / "runs.json")
    record = kept["ga"]["value"]
    assert [row["step"] for row in record["rows"]] == list(range(0, 21, 4))
    assert record["rows"][0]["groups"]["unlearn"].keys() == {"embed", "shallow", "middle", "deep", "lm_head"}
    assert all(row["total"]["unlearn"] < 0 for row in record["rows"])
    settings = kept["ga"]["identity"]
    assert settings["unlearn"]["forget"][0]["reduction"] == "sequence_mean"
    assert {path.name for path in out.glob("*.svg")} == {"fig10.svg", "heat.svg"}
    heat = kept["tnpo-4"]["value"]["heat"]
    assert len(heat) == 2
    for drawn in heat:
        assert drawn["steps"] == list(range(0, 21, 4))
        assert len(drawn["weights"]) == 6
        assert {len(row) for row in drawn["weights"]} == {len(drawn["tokens"])}
        assert 0 <= min(map(min, drawn["weights"])) <= max(map(max, drawn["weights"])) <= 2

    def never(*args):
        raise AssertionError("the record is there")

    monkeypatch.setattr(runs, "compute", never)
    main(["fig10", *words])
    del settings["unlearn"]["keep_steps"]  # written when there was no such setting
    Store(out / "runs.json").put("ga", record, settings)
    main(["fig10", *words])
    with pytest.raises(AssertionError, match="the record is there"):  # other settings, another record
        main(["fig10", *words, "--set", "unlearn.learning_rate=2e-3"])


def test_records_of_terms_and_samples(study):
    words, out = study
    base = load_config(HERE / "embedded.yaml", words[1:-4:2])
    record = runs.measure(base, "npo-1", out, out.parent / "work", Console(quiet=True))
    assert list(record["points"]) == [str(step) for step in runs.SCATTER_STEPS]
    for points in record["points"].values():
        assert {len(values) for values in points.values()} == {2}
    assert record["rows"][0]["weights"] == {"forget.npo": pytest.approx(1, abs=1e-5)}
    settings = runs.settings_of(base, "rmu+rr")
    for role in ("forget", "retain"):  # Eq. 8 and 19, on one scale
        (term,) = settings["unlearn"][role]
        assert (term["reduction"], term.keys() & {"preset", "coefficient"}) == ("sequence_token_mean", set())
    record = runs.compute(base, "rmu+rr", settings, out.parent / "work")  # not rounded
    for row in record["rows"]:
        for metric, total in row["total"].items():
            assert total == pytest.approx(sum(term[metric] for term in row["terms"].values()), rel=1e-5)
    assert record["rows"][0]["terms"]["retain.rr"] == {"unlearn": pytest.approx(0), "retain": pytest.approx(0)}
    assert record["rows"][-1]["terms"]["retain.rr"]["retain"] != 0


def test_unknown_figures_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["fig99"])
    error = capsys.readouterr().err
    assert "figure='fig99': did you mean fig09" in error
    assert "needs one of fig03, fig04" in error


def made_up(name, removal=-1.0, ratio=0.5, weight=0.01, inverse=1.0, above=()):
    """A record whose G-effects swell and fade; the retaining one is `ratio` of the other."""
    steps = range(0, 61, 10)
    rows = []
    for step in steps:
        size = removal * math.exp(-(((step - 30) / 15) ** 2)) * (-1 if step in above else 1)
        total = {"unlearn": size, "retain": ratio * size}
        shares = {"embed": 0.05, "shallow": 0.5, "middle": 0.2, "deep": 0.15, "lm_head": 0.1}
        rows.append(
            {
                "step": step,
                "total": total,
                "groups": {m: {group: share * value for group, share in shares.items()} for m, value in total.items()},
                "nll": {"unlearn": step / 10, "retain": step / 20},
                "log10_inverse_confidence": inverse * step / 60,
                "weights": {f"forget.{name.split('-')[0]}": weight ** (step / 60)},
                "terms": {f"retain.{term}": {"unlearn": 0.0, "retain": -ratio * size} for term in ("gd", "kl", "rr")},
            }
        )
    points = {
        str(step): {"unlearn": [-1, -2, -3], "retain": [-0.1, -0.2, -0.3], "weight": [0.9, 0.5, 0.1]}
        for step in runs.SCATTER_STEPS
    }
    words = {"tokens": ["a", " b"], "steps": [0, 60], "weights": [[1.0, 1.0], [0.2, 0.5]], "question": "Who?"}
    settings = runs.settings_of(load_config(HERE / "embedded.yaml"), name)
    return {"name": name, "settings": settings, "stopped": None, "rows": rows, "points": points, "heat": [words],
            "seconds_a_probe": 0.5, "device": "a machine", "versions": {"torch": "2", "transformers": "5"}}  # fmt: skip


@pytest.fixture(scope="module")
def records():
    return {name: made_up(name) for name in runs.RUNS}


def outcome(name, records):
    (check,) = (each.check for each in OBSERVATIONS if each.check.__name__ == name)
    return check(records)


def test_observations_follow_the_records(records):
    assert outcome("shallow_first", records)[0]
    assert outcome("all_compromise", records)[0]
    assert not outcome("rmu_scale", records)[0]
    assert not outcome("po_relearns", records)[0]
    assert outcome("po_relearns", {**records, "po": made_up("po", above=(40, 50, 60))}) == (
        True,
        "lowest -1 at step 30, first -0.0183, last 0.0183; above 0 at 3 of 7 probes from step 40 on; risk 0 to 6 at "
        "most and 6 at the end",
    )
    assert not outcome("ga_costs", records)[0]
    ga = made_up("ga", removal=-100, ratio=1.1, inverse=17)
    assert outcome("ga_costs", {**records, "ga": ga}) == (
        True,
        "correlation 1.000; lowest -100 (unlearning) and -110 (retaining), which is the lower one at 7 of 7 probes; "
        "ratio of the sums 1.10",
    )
    assert outcome("wga_curbs", {**records, "ga": ga})[0]
    assert outcome("inverse_confidence", {**records, "ga": ga}) == (
        True,
        "log10 of the highest: GA 17, WGA 1, NPO 1 (the paper: 17 under GA)",
    )
    assert outcome("weighted_samples", records)[0]
    assert outcome("kl_above_gd", {**records, "npo+kl": made_up("npo+kl", removal=-2)})[0]
    assert not outcome("kl_above_gd", records)[0]


def test_the_page_has_every_observation_run_and_figure(records, tmp_path):
    records = {**records, "ga": {**records["ga"], "stopped": "step 9: the loss is not finite"}}
    text = write_page(records, tmp_path).read_text()
    assert f"of {len(OBSERVATIONS)}. The comparisons" in text
    for each in OBSERVATIONS:
        holds, figures = each.check(records)
        answer = "yes" if holds else "no"
        assert f"| {each.claim} ({each.where}) | {each.criterion} | **{answer}** | {figures} |\n" in text
    assert "| ga (stopped: step 9: the loss is not finite) | " in text
    assert all(f"\n| {name} | " in text for name in runs.RUNS if name != "ga")
    assert all(f"]({name}.svg)" in text for name in FIGURES)


@pytest.mark.parametrize("name", ["fig03", "fig05", "fig06", "fig08", "fig09", "heat"])  # the others are made of these
def test_figures_draw(records, tmp_path, name):
    svg = write(name, {run: records[run] for run in FIGURES[name].runs}, tmp_path).read_text()
    assert svg.count("<svg") == 1


def test_the_same_records_give_the_same_file(records, tmp_path):
    first, second = (write("fig06", {"po": records["po"]}, tmp_path / part).read_bytes() for part in "ab")
    assert first == second


def test_every_figure_needs_runs_that_there_are_and_every_run_is_drawn():
    assert {run for drawn in FIGURES.values() for run in drawn.runs} == set(runs.RUNS)


@pytest.mark.parametrize(("folder", "base"), [("geffect", "embedded"), ("geffect/smollm2", "smollm2_tofu")])
def test_committed_records_stand(folder, base):
    """None would be computed again, and each says what it was made with."""
    (file,) = RESULTS.glob(f"*/{folder}/runs.json")
    kept = units(file)
    changes = ["data.forget.path=forget01.jsonl", "data.retain.path=retain99.jsonl"] if base == "smollm2_tofu" else []
    for name, unit in kept.items():
        settings = runs.settings_of(load_config(HERE / f"{base}.yaml", changes), name)
        assert runs.fill(unit["identity"]) == runs.fill(settings), name
        assert {"rows", "device", "versions", "commit"} <= unit["value"].keys()
    assert base != "embedded" or kept.keys() == runs.RUNS.keys()
