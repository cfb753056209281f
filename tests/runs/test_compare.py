"""Finished runs side by side, from folders as runs leave them."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyunlearn.cli import app
from pyunlearn.report.compare import render_comparison
from pyunlearn.runs.compare import compare, compare_runs
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.table import make_table

BEFORE = {"forget": {"probability": 0.99}, "retain": {"probability": 0.98, "rouge_l": 0.9}}


@pytest.fixture
def finished(tmp_path):
    """Makes the folder of a run that ended with these probabilities."""

    def make(name, forgotten, kept, seed=0, steps=(), samples=(), data=None, **unlearn):
        config = RunConfig.model_validate({"name": name, "seed": seed, "data": data or {}, "unlearn": unlearn})
        folder = RunFolder(tmp_path / f"{name}-{seed}")
        folder.open(config)
        after = {"forget": {"probability": forgotten}, "retain": {"probability": kept, "rouge_l": kept}}
        rows = {name: [{"probability": p} for p in samples] for name in after}
        table = {
            "table": make_table({"before": BEFORE, "after": after}, {"before": rows, "after": rows}),
            "goals": [],
        }
        (folder.path / "table.json").write_text(json.dumps(table))
        (folder.path / "evaluation").mkdir()
        for step, means in steps:
            folder.evaluation(f"step-{step}.json").write_text(json.dumps(means))
        return folder.path

    return make


def test_seeds_of_one_kind_become_one_row(finished):
    runs = [finished("npo", 0.1 + seed / 100, 0.9, seed, forget="npo") for seed in range(3)]
    comparison = compare_runs([*runs, finished("ga", 0.0, 0.2, forget="ga")])
    npo, ga = comparison.groups
    assert (npo.name, npo.seeds, ga.seeds) == ("npo", [0, 1, 2], [0])
    assert npo.mean(("forget", "probability")) == pytest.approx(0.11)
    # half of the 95 % interval of three values: 4.3027 standard errors
    assert npo.half_width(("forget", "probability")) == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-5)
    assert ga.half_width(("forget", "probability")) is None
    assert ga.text(("retain", "rouge_l")) == "0.200"
    assert ga.text(("holdout", "rouge_l")) == "–"
    assert comparison.columns == [
        ("forget", "probability"), ("retain", "probability"), ("retain", "rouge_l"),
        ("aggregate", "forgotten"), ("aggregate", "kept"), ("aggregate", "both"),
    ]  # fmt: skip
    names = [[term["name"] for term in terms] for terms in comparison.differences["unlearn.forget"]]
    assert names == [["npo"], ["ga"]]
    assert list(comparison.differences) == ["unlearn.forget"]


def test_aggregates_are_of_what_all_runs_have(finished):
    runs = [finished("npo", 0.2, 0.9, forget="npo"), finished("ga", 0.0, 0.0, forget="ga")]
    comparison = compare_runs(runs)
    npo, ga = comparison.groups
    assert npo.mean(("aggregate", "forgotten")) == pytest.approx(0.8)
    assert npo.mean(("aggregate", "kept")) == pytest.approx(0.9)
    assert npo.mean(("aggregate", "both")) == pytest.approx(2 / (1 / 0.8 + 1 / 0.9))
    assert npo.mean(("aggregate", "forgotten"), "before") == pytest.approx(0.01)
    assert npo.mean(("aggregate", "kept"), "before") == pytest.approx(2 / (1 / 0.98 + 1 / 0.9))
    assert (ga.mean(("aggregate", "forgotten")), ga.mean(("aggregate", "both"))) == (1.0, 0.0)
    assert comparison.note == (
        "aggregate: forgotten is the harmonic mean of 1 - each of forget probability; kept that of retain probability, "
        "retain rouge l; both that of these two"
    )
    table = json.loads((runs[1] / "table.json").read_text())
    table["table"] = [row for row in table["table"] if row["metric"] != "rouge_l"]
    (runs[1] / "table.json").write_text(json.dumps(table))
    assert compare_runs(runs).groups[0].mean(("aggregate", "kept")) == pytest.approx(0.9)
    assert "rouge" not in compare_runs(runs).note
    table["table"] = [row for row in table["table"] if row["set"] == "forget"]
    (runs[1] / "table.json").write_text(json.dumps(table))
    comparison = compare_runs(runs)
    assert not comparison.note
    assert all(name != "aggregate" for name, _ in comparison.columns)


def test_files_hold_what_is_shown(finished, tmp_path):
    steps = [(5, {"forget": {"probability": 0.5}, "retain": {"probability": 0.95}})]
    runs = [finished("a_b", 0.2, 0.9, seed, steps) for seed in (0, 1)]
    out = tmp_path / "side by side"
    comparison = compare([*runs, finished("other", 0.3, 0.8, learning_rate=1e-3)], out=out)
    records = json.loads((out / "compare.json").read_text())
    assert records["differences"] == {"unlearn.learning_rate": [5e-4, 1e-3]}
    assert records["groups"][0]["seeds"] == [0, 1]
    with open(out / "compare.csv", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if (row["set"], row["moment"]) == ("forget", "after")]
    assert [(row["name"], float(row["mean"]), row["runs"]) for row in rows] == [("a_b", 0.2, "2"), ("other", 0.3, "1")]
    latex = (out / "compare.tex").read_text()
    assert r"a\_b & 0.200 $\pm$ 0.000 & 0.900 $\pm$ 0.000" in latex
    assert latex.count(r"\\") == 4  # a head, the values before, two kinds
    page = (out / "compare.html").read_text()
    assert 'href="../a_b-1/report.html"' in page
    assert "<svg" in page
    assert not re.findall(r"(?:href|src)=.http", page)
    assert comparison.groups[0].steps[0] == {5: steps[0][1]}
    assert "Lines: " not in page  # one evaluation makes none
    later = finished("curve", 0.2, 0.9, 2, [*steps, (7, steps[0][1])])
    compare([later], out=out)
    assert "Lines: evaluations on the way." in (out / "compare.html").read_text()


def test_who_is_not_drawn_and_whose_samples_are_others_is_told(finished, tmp_path, capsys):
    one, other = finished("one", 0.1, 0.9), finished("other", 0.2, 0.8, data={"num_authors": 30})
    table = json.loads((other / "table.json").read_text())
    table["table"] = [row for row in table["table"] if row["set"] == "forget"]
    (other / "table.json").write_text(json.dumps(table))
    compare([one, other], out=tmp_path / "out", console=Console(width=200))
    page, screen = (tmp_path / "out" / "compare.html").read_text(), capsys.readouterr().out
    for text in (
        "not the same samples: the runs differ in data.num_authors",
        "not drawn in the figure: other (no probability of retain)",
    ):
        assert text in screen
        assert text[0].upper() + text[1:] in page
    same = compare_runs([one, finished("two", 0.2, 0.8, data={"max_length": 64})])
    assert same.notes == [same.note]


def test_a_single_run_has_its_interval_over_samples(finished, tmp_path, capsys):
    runs = [finished("one", 0.2, 0.9, samples=(0.1, 0.2, 0.3)), finished("old", 0.3, 0.9, learning_rate=1e-3)]
    comparison = compare(runs, out=tmp_path / "out", console=Console(width=160))
    one, old = comparison.groups
    low, high = one.interval(("forget", "probability"))
    assert 0.1 <= low < 0.2 < high <= 0.3
    told = f"0.200 [{low:.3f}, {high:.3f}]"
    assert one.text(("forget", "probability")) == told
    assert old.text(("forget", "probability")) == "0.300"
    assert told in (tmp_path / "out" / "compare.html").read_text()
    assert told in (tmp_path / "out" / "compare.tex").read_text()
    screen = capsys.readouterr().out
    assert told in screen
    assert "95% interval of a run's mean over such samples" in screen
    with open(tmp_path / "out" / "compare.csv", newline="") as lines:
        rows = {row["name"]: row for row in csv.DictReader(lines) if (row["set"], row["moment"]) == ("forget", "after")}
    assert (rows["one"]["low_95"], rows["one"]["high_95"]) == (str(low), str(high))
    assert rows["old"]["low_95"] == rows["one"]["half_width_95"] == ""
    several = compare_runs([runs[0], finished("one", 0.4, 0.9, seed=1, samples=(0.1, 0.2, 0.3))]).groups[0]
    assert several.interval(("forget", "probability")) is None
    assert "±" in several.text(("forget", "probability"))


def test_what_cannot_be_compared_is_named(finished, tmp_path):
    run = finished("a", 0.1, 0.9)
    with pytest.raises(ValueError, match="needs one finished run folder at least"):
        compare_runs([])
    with pytest.raises(ValueError, match="is named twice"):
        compare_runs([run, run.parent / "." / run.name])
    with pytest.raises(FileNotFoundError, match="no finished run there"):
        compare_runs([run, tmp_path])
    with pytest.raises(FileExistsError, match="is a run folder"):
        compare([run], out=run)
    for damaged in ("{", '{"forget": {}}'):
        (run / "evaluation" / "step-3.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"step-3\.json"):
            compare_runs([run])
    (run / "evaluation" / "step-3.json").unlink()
    (run / "table.json").write_text('{"table": [3], "goals": []}')
    with pytest.raises(ValueError, match=r"table\.json: is damaged"):
        compare_runs([run])
    (run / "table.json").write_text("[")
    with pytest.raises(ValueError, match=r"table\.json"):
        compare_runs([run])


def test_any_name_of_a_folder_is_in_legend_and_links(finished, tmp_path):
    odd = finished("a", 0.1, 0.9).rename(tmp_path / "_100%#1?$\\frac{x$")
    compare([odd, finished("b", 0.1, 0.9, seed=1)], out=tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "> _100%#1?$\\frac{x$</text>" in html
    assert 'href="../_100%25%231%3F%24%5Cfrac%7Bx%24/report.html"' in html


@pytest.mark.parametrize("key", ["name", "seed"])
def test_a_run_without_its_name_or_seed_is_told(finished, key):
    run = finished("a", 0.1, 0.9)
    config = run / "config.yaml"
    config.write_text("".join(line for line in config.open() if not line.startswith(f"{key}:")))
    with pytest.raises(ValueError, match=rf"config\.yaml: is damaged, it has no {key}"):
        compare_runs([run])


def test_the_command(finished, tmp_path):
    runs = [finished("a", 0.1, 0.9), finished("b", 0.4, 0.95, forget="npo")]
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "compare.html" in result.output
    assert "unlearn.forget" in result.output
    assert "{" not in result.output
    assert 'do pyunlearn calibrate uwc "$run"; done' in result.output.replace("\n", " ")
    missing = CliRunner().invoke(app, ["compare", str(tmp_path / "nothing")])
    assert missing.exit_code == 2
    assert "RUN: no such folder: " in missing.output


def test_other_beginnings_are_told(finished, capsys):
    one, other = finished("a", 0.1, 0.9), finished("b", 0.1, 0.9, forget="npo")
    table = json.loads((other / "table.json").read_text())
    table["table"][0]["before"] = 0.5
    (other / "table.json").write_text(json.dumps(table))
    console = Console(width=120)
    comparison = compare([one, other], console=console)
    screen = capsys.readouterr().out
    assert screen.index("did not begin alike") < screen.index("after unlearning")
    column = ("forget", "probability")
    assert comparison.before(column) == "differs"
    assert [comparison.text(group, column) for group in comparison.groups] == ["0.990 → 0.100", "0.500 → 0.100"]
    assert "0.500 → 0.100" in screen
    assert comparison.before(("retain", "rouge_l")) == "0.900"
    assert comparison.text(comparison.groups[1], ("retain", "rouge_l")) == "0.900"
    page = render_comparison(compare_runs([one, other]), {str(one): "", str(other): ""})
    assert "The runs did not begin alike: where “before” differs, each has its own, before → after." in page
    assert page.index("did not begin alike") < page.index("<table>")
    assert not any("alike" in note for note in compare_runs([one]).notes)
    assert statistics.fmean([0.99]) == compare_runs([one]).groups[0].mean(("forget", "probability"), "before")


def test_a_rate_that_nobody_chose_is_the_one_that_was_used(finished):
    runs = [finished(name, 0.1, 0.9, forget="ga") for name in ("a", "b", "c")]
    for run, rate in zip(runs, (5e-5, 1e-5, None), strict=True):
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("  learning_rate: 0.0005\n  ", "  learning_rate: null\n  "))
        assert RunFolder(run).read_config()["unlearn"]["learning_rate"] is None
        if rate is not None:
            (run / "unlearning.json").write_text(json.dumps({"steps": 3, "learning_rate": rate}))
    comparison = compare_runs(runs)
    assert comparison.differences == {"unlearn.learning_rate": [5e-5, 1e-5, None]}


def test_what_had_nothing_to_forget_has_no_number_of_it(finished):
    runs = [finished("a", 0.1, 0.9), finished("b", 0.1, 0.9, forget="npo")]
    table = json.loads((runs[1] / "table.json").read_text())
    table["verdict"] = {"name": "there was nothing to forget"}
    (runs[1] / "table.json").write_text(json.dumps(table))
    knew, other = compare_runs(runs).groups
    for name in ("forgotten", "both"):
        assert knew.mean(("aggregate", name)) is not None
        assert other.text(("aggregate", name)) == "–"
    assert other.mean(("aggregate", "kept")) == knew.mean(("aggregate", "kept"))


def test_means_of_few_rows_are_told(finished):
    few, enough = finished("a", 0.1, 0.9, samples=(0.9, 0.8)), finished("b", 0.1, 0.9, samples=[0.9] * 10)
    told = "few rows (forget 2, retain 2): their means tell little, with any number of seeds"
    assert told in compare_runs([few, enough]).notes
    assert not any(note.startswith("few rows") for note in compare_runs([enough]).notes)


def test_a_folder_of_a_sweep_tells_its_runs(finished, tmp_path):
    run = finished("a", 0.1, 0.9)
    (tmp_path / "grid/runs/a").mkdir(parents=True)
    run.rename(tmp_path / "grid/runs/a/seed0")
    with pytest.raises(FileNotFoundError, match=r"it is a sweep's folder, its runs are .*grid/runs/\*/seed\*"):
        compare_runs([tmp_path / "grid"])
