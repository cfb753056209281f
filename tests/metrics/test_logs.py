"""Logs as OpenUnlearning and TOFU lay them out: read, written, and told where they are none."""

from __future__ import annotations

import json
import math
import re

import pytest

from pyunlearn.metrics import Entry, aggregate, get_suite, read_log, write_log

LOG = {
    "forget_truth_ratio": Entry(0.5, {0: {"score": 0.25}, 2: {"score": 0.75}, 10: {"score": math.inf}}),
    "forget_Q_A_ROUGE": Entry(
        1.0, {0: {"rouge1_recall": 1.0, "rougeL_f1": 1.0, "rougeL_recall": 1.0, "input": "?", "ground_truth": "größer",
                  "generation": "größer"}},
    ),
    "mia_min_k": Entry(0.75, {}, {part: Entry(1.5, {0: {"score": 1.5}}) for part in ("forget", "holdout")}),
    "forget_quality": Entry(None),
    "model_utility": Entry(math.nan),
}  # fmt: skip


def test_round_trip(tmp_path):
    paths = write_log(tmp_path / "evals", LOG, ["model_utility", "forget_quality", "forget_truth_ratio"])
    assert [path.name for path in paths] == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]
    for place in (paths[0], tmp_path / "evals"):
        found = read_log(place)
        assert found.keys() == LOG.keys()
        assert math.isnan(found.pop("model_utility").value)
        assert found == {name: entry for name, entry in LOG.items() if name != "model_utility"}
    assert found["forget_truth_ratio"].column() == [0.25, 0.75, math.inf]
    summary = read_log(paths[1])
    assert summary["forget_truth_ratio"] == Entry(0.5)
    assert summary["forget_quality"] == Entry(None)


def test_the_layout_is_theirs(tmp_path):
    path, summary = write_log(tmp_path, LOG, ["mia_min_k"])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == sorted(LOG)
    assert content["forget_truth_ratio"]["value_by_index"]["10"] == {"score": math.inf}
    assert content["forget_quality"] == {"agg_value": None}
    part = {"agg_value": 1.5, "value_by_index": {"0": {"score": 1.5}}}
    assert content["mia_min_k"] == {"agg_value": 0.75, "auc": 0.75, "forget": part, "holdout": part}
    assert json.loads(summary.read_text()) == {"mia_min_k": 0.75}
    assert '\n    "forget_Q_A_ROUGE": {\n        "agg_value": 1.0' in path.read_text(encoding="utf-8")


def test_what_others_wrote(tmp_path):
    """Lists of wrong answers, metrics and keys that we do not know, indices out of order."""
    theirs = {
        "forget_Q_A_PERT_Prob": {
            "agg_value": 0.5,
            "value_by_index": {"10": {"prob": [0.1, 0.9], "avg_loss": [2.3, 0.1]}, "9": {"prob": None}},
        },
        "rel_diff": {"agg_value": -3, "whatever": [1]},
    }
    (tmp_path / "MUSE_EVAL.json").write_text(json.dumps(theirs))
    (tmp_path / "LMEval_EVAL.json").write_text("{}")
    found = read_log(tmp_path)
    assert list(found["forget_Q_A_PERT_Prob"].samples) == [9, 10]
    assert found["forget_Q_A_PERT_Prob"].column("prob") == [[0.1, 0.9]]
    assert found["rel_diff"] == Entry(-3)


def test_tofus_own(tmp_path):
    columns = {
        "avg_gt_loss": {"0": math.log(2), "1": 0.0},
        "avg_paraphrased_loss": {"0": math.log(2), "1": 0.0},
        "average_perturb_loss": {"0": [math.log(4), math.log(16)], "1": [math.log(2), math.log(2)]},
        "generated_text": {"0": ["What?", "a b", "a c"], "1": ["Who?", "d", "d"]},
    }
    (tmp_path / "eval_real_world_wo_options.json").write_text(json.dumps(columns))
    geometric, arithmetic = (read_log(tmp_path, variant) for variant in ("geometric", "arithmetic"))
    assert geometric["wf_Truth_Ratio"].column() == pytest.approx([1 / 4, 1 / 2])
    assert geometric["wf_Truth_Ratio"].value == pytest.approx(5 / 8)
    assert arithmetic["wf_Truth_Ratio"].column() == pytest.approx([5 / 16, 1 / 2])
    assert geometric["wf_Q_A_Prob"].column("prob") == pytest.approx([1 / 2, 1])
    assert geometric["wf_Q_A_Prob_normalised"].column("prob") == pytest.approx([0.5 / (0.5 + 5 / 16), 1 / 2])
    assert geometric["wf_Q_A_ROUGE"].value == 0.75
    assert geometric["wf_Q_A_ROUGE"].samples[0]["input"] == "What?"
    (tmp_path / "other.json").write_text(json.dumps(columns))
    with pytest.raises(ValueError, match="is a log of TOFU's, of which set its name has to tell"):
        read_log(tmp_path / "other.json")
    del columns["generated_text"]["1"]
    (tmp_path / "eval_log.json").write_text(json.dumps(columns))
    with pytest.raises(ValueError, match=r"eval_log\.json: needs .* of the same samples"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("avg_gt_loss", None, "avg_gt_loss needs a loss >= 0 for every index, got None for '0'"),
        ("avg_gt_loss", -1e6, "avg_gt_loss needs a loss >= 0"),
        ("avg_paraphrased_loss", "1", "avg_paraphrased_loss needs a loss >= 0 for every index, got '1'"),
        ("average_perturb_loss", [], "average_perturb_loss needs losses >= 0"),
        ("average_perturb_loss", 1.0, "average_perturb_loss needs losses >= 0"),
        ("generated_text", ["What?", "a"], "generated_text needs question, generated text and answer"),
        ("generated_text", [1, 2, 3], "generated_text needs question, generated text and answer"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, column, value, message):
    columns = {
        "avg_gt_loss": {"0": math.nan}, "avg_paraphrased_loss": {"0": 1}, "average_perturb_loss": {"0": [1.0]},
        "generated_text": {"0": ["What?", "a", "a"]},
    }  # fmt: skip
    path = tmp_path / "eval_log.json"
    path.write_text(json.dumps(columns))
    assert math.isnan(read_log(path)["retain_Q_A_Prob"].value)  # as it is in the file
    path.write_text(json.dumps({**columns, column: {"0": value}}))
    with pytest.raises(ValueError, match=f"eval_log.json: {message}"):
        read_log(path)
    path.write_text(json.dumps({**columns, column: {"first": value}}))
    with pytest.raises(ValueError, match=f"eval_log.json: {column} needs .* for 'first'"):
        read_log(path)


def test_an_index_is_a_number_however_it_is_written(tmp_path):
    (tmp_path / "TOFU_EVAL.json").write_text('{"a": {"agg_value": 1, "value_by_index": {"01": {"prob": 2}}}}')
    assert read_log(tmp_path)["a"].samples == {1: {"prob": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no log, it is not JSON"),
        ("[1]", "needs an object of metrics, got list"),
        ('{"a": {"b": 1}}', "'a' needs a number or an object with agg_value"),
        ('{"a": "high"}', "'a' needs a number or an object with agg_value"),
        ('{"a": {"agg_value": "1"}}', "'a' needs a number or null as agg_value, got '1'"),
        ('{"a": {"agg_value": 1, "value_by_index": {"x": {}}}}', "'a' needs value_by_index, an object for every index"),
        ('{"a": {"agg_value": 1, "value_by_index": [1]}}', "'a' needs value_by_index"),
    ],
)
def test_what_is_no_log(tmp_path, content, message):
    (tmp_path / "TOFU_EVAL.json").write_text(content)
    with pytest.raises(ValueError, match=f"TOFU_EVAL.json: .*{message}"):
        read_log(tmp_path / "TOFU_EVAL.json")


def written(tmp_path, content):
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("extra", ["hi", [1], {"of": "them"}, True, {"agg_value": 1, "value_by_index": [1]}])
def test_what_is_not_known_beside_an_entry_is_no_matter(tmp_path, extra):
    good = {"agg_value": 0.4, "forget": None, "note": [1]}
    log = read_log(written(tmp_path, {"note": extra, "mia_min_k": good}))
    assert log["mia_min_k"] == Entry(0.4)
    get_suite("tofu").check_log("retain", log, "log")
    with pytest.raises(ValueError, match=r"TOFU_EVAL\.json: 'note' needs"):
        log["note"].column()


def test_a_sample_without_values_is_none(tmp_path):
    samples = {"0": None, "1": {"score": 0.5, "why": "so"}, "2": {"score": None}}
    whole = {"agg_value": 0.5, "value_by_index": samples}
    log = read_log(written(tmp_path, {"forget_truth_ratio": whole, "a": {"agg_value": 0.1, "value_by_index": None}}))
    assert log["forget_truth_ratio"].column() == [0.5]
    assert log["a"] == Entry(0.1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"agg_value": 1, "value_by_index": {"3": {"score": "a"}}}, "needs a number as score of '3', got 'a'"),
        ({"agg_value": 1, "value_by_index": {"3": {"prob": [0.1, "a"]}}}, "needs a number as prob of '3'"),
        ({"agg_value": 1, "value_by_index": {"3": 1.0}}, "needs value_by_index, an object for every index, got 1.0"),
        ("high", "needs a number or an object with agg_value, got 'high'"),
    ],
)
def test_an_entry_that_is_needed_and_damaged_is_named(tmp_path, entry, message):
    log = read_log(written(tmp_path, {"forget_truth_ratio": entry, "mia_min_k": {"agg_value": 0.4}}))
    suite = get_suite("tofu")
    with pytest.raises(
        ValueError, match=f"--retain-log=L: .*TOFU_EVAL.json: 'forget_truth_ratio' {re.escape(message)}"
    ):
        suite.check_log("retain", log, "--retain-log=L")
    quality = [each for each in suite.aggregates if each.name == "forget_quality"]
    (number,), _ = aggregate(quality, {"forget_truth_ratio": Entry(1, {0: {"score": 1.0}})}, {"retain": log})
    assert number.value is None
    assert message in number.note


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1])
def test_an_auc_that_is_none_is_told(tmp_path, value):
    log = read_log(written(tmp_path, {"mia_min_k": {"agg_value": value}}))
    leak = [each for each in get_suite("open_unlearning").aggregates if each.name == "privleak"]
    (number,), _ = aggregate(leak, {"mia_min_k": Entry(0.3)}, {"retain": log})
    assert (number.value, number.note) == (
        None, f"the retain log has {value} as the AUC of mia_min_k, needs a number from 0 to 1",
    )  # fmt: skip


def test_where_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such log: .*TOFU_EVAL\.jso"):
        read_log(tmp_path / "TOFU_EVAL.jso")
    with pytest.raises(ValueError, match=r"needs one \*_EVAL\.json, or files of TOFU's .* has none"):
        read_log(tmp_path)
    for name in ("A", "B"):
        (tmp_path / f"{name}_EVAL.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has A_EVAL\.json, B_EVAL\.json"):
        read_log(tmp_path)
