"""pyunlearn calibrate cru: the parts of the unlearned model that forget at little cost, by layer or component."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from scipy.stats import ks_2samp, spearmanr

from pyunlearn.calibration.cru import KINDS
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.load import load_model
from pyunlearn.runs.compare import compare_runs
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.cru import (
    Hybrids,
    Measures,
    agreement_of,
    calibrate_cru,
    choose_measures,
    retrained_ratios,
    warn,
)
from pyunlearn.runs.pair import opened
from pyunlearn.runs.run import load_result, run
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

from .calibrated import KNOWS, weights


def test_cru_puts_together_what_forgets_at_little_cost(folder):
    result = calibrate_cru(folder, validation=0.4, forgetting="forgotten", target=0.8)
    place = folder / "cru"
    names = {name for name, _ in result.order}
    assert names <= {"layer 0", "layer 1", "rest"}
    assert {"layer 0", "layer 1"} <= names
    assert result.k == len(result.chosen) >= 1
    before, after, hybrid = (
        load_model(str(path))[0] for path in (folder / "memorised", folder / "checkpoint", place / "checkpoint")
    )
    for depth in range(2):
        source = after if f"layer {depth}" in result.chosen else before
        block = source.model.layers[depth].state_dict()
        assert all(torch.equal(own, block[key]) for key, own in hybrid.model.layers[depth].state_dict().items())
    limit = result.curve[0][1] + 0.8 * (result.curve[-1][1] - result.curve[0][1])
    assert result.curve[result.k] == max(pair for pair in result.curve if pair[1] >= limit)
    # validation rows are in no table
    kept = json.loads((place / "cru.json").read_text())
    rows = {name: len(own) for name, own in kept["rows"].items()}
    assert rows == result.counts
    whole = {row["set"]: row["samples"] for row in load_result(folder).table if row["metric"] == "probability"}
    left = {row["set"]: row["samples"] for row in load_result(place).table if row["metric"] == "probability"}
    assert left == {name: n - rows.get(name, 0) for name, n in whole.items()}
    written = [json.loads(line) for line in (folder / "evaluation/before-retain.jsonl").read_text().splitlines()]
    rest = [record["probability"] for record in written if record["index"] not in kept["rows"]["retain"]]
    (row,) = [row for row in load_result(place).table if (row["set"], row["metric"]) == ("retain", "probability")]
    assert row["before"] == pytest.approx(sum(rest) / len(rest))
    assert (place / "report.html").read_text().count("<svg") == 4
    assert [group.name for group in compare_runs([folder, place]).groups] == ["tiny", "tiny-cru"]


def test_an_order_on_which_halves_of_the_rows_do_not_agree_is_told_to_be_noise():
    scores = [(0.9, 0.1), (0.8, 0.3), (0.7, 0.2), (0.4, 0.6), (0.3, 0.9)]
    alike = {f"layer {i}": [score] * 3 for i, score in enumerate(scores)}
    assert agreement_of(alike) == pytest.approx(1)
    turned = {name: [own[0], own[0], (1 - i / 9, 1 - i / 9)] for i, (name, own) in enumerate(alike.items())}
    sums = [1 + 5, 2 + 3, 3 + 4, 4 + 2, 5 + 1], [1 + 1, 2 + 2, 3 + 3, 4 + 4, 5 + 5]  # of ranks in each, by hand
    assert agreement_of(turned) == pytest.approx(spearmanr(*sums).statistic)
    curve = [(1.0, 0.0), (0.9, 0.5), (0.8, 1.0)]
    assert [*warn(1, curve, None), *warn(1, curve, 0.5)] == []
    assert "rank correlation of 0.10" in warn(1, curve, 0.1)[0]
    assert agreement_of({name: own[:1] for name, own in alike.items()}) is None  # sets of one row have no halves
    assert agreement_of(dict([*alike.items()][:3])) is None
    assert agreement_of(dict.fromkeys(alike, [scores[0]] * 3)) is None  # no order


def test_all_of_the_components_are_the_unlearned_model_and_none_the_original(folder):
    with opened(folder, "cru", None, "") as pair:
        adapted = pair.adapter is not None
        if adapted:
            with pytest.raises(ValueError, match="component=norm: unlearning has changed none of"):
                Hybrids(pair, "norm")  # an adapter is on linear layers
        for kind in KINDS[: 3 if adapted else 4]:
            hybrids = Hybrids(pair, kind)
            names = [*hybrids.parts]
            assert model_fingerprint(hybrids.become(names)[0]) == weights(folder / "checkpoint")
            assert model_fingerprint(hybrids.become([])[0]) == weights(folder / "memorised")
            one = model_fingerprint(hybrids.become(names[:1])[0])
            assert one not in (weights(folder / "memorised"), weights(folder / "checkpoint"))


def test_cru_stopped_and_continued(folder, monkeypatch):
    options = {"validation": 0.4, "forgetting": "forgotten"}
    whole = calibrate_cru(folder, **options)
    shutil.rmtree(folder / "cru")
    of, measured = Measures.of, []

    def counted(self, *args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return of(self, *args)

    monkeypatch.setattr(Measures, "of", counted)
    with pytest.raises(Interrupted):
        calibrate_cru(folder, **options)
    monkeypatch.setattr(Measures, "of", lambda self, *args: measured.append(1) or of(self, *args))
    result = calibrate_cru(folder, **options)
    assert (result.influence, result.curve, result.k) == (whole.influence, whole.curve, whole.k)
    assert len(measured) == 1 + len(result.order) + len(result.order) - 1  # the first of the order is a hybrid, too


def test_forget_quality_against_a_retrained_model(tiny_settings, tmp_path):
    changes = {"output": str(tmp_path / "run"), "evaluate": {"anchors": ["retrained"]}}
    run(RunConfig.model_validate(merge(merge(tiny_settings, KNOWS), changes)))
    with opened(tmp_path / "run", "cru", None, "") as pair:
        lines = (tmp_path / "run/evaluation/retrained-forget.jsonl").read_text().splitlines()
        assert retrained_ratios(pair) == [json.loads(line)["truth_ratio"] for line in lines]
        assert choose_measures(pair, None, None) == ("probability", "forget_quality")
        model, tokenizer = Hybrids(pair, "layer").become([])
        sets = {name: pair.sets()[name] for name in ("forget", "retain")}
        measures = Measures(pair, "probability", "forget_quality", sets)
        (utility, quality), *halves = measures.of(model, tokenizer)
        count = len(sets["retain"])
    table = {(row["set"], row["metric"]): row for row in load_result(tmp_path / "run").table}
    assert utility == pytest.approx(table["retain", "probability"]["before"])
    sizes = (count + 1) // 2, count // 2
    assert utility * count == pytest.approx(sum(n * half[0] for n, half in zip(sizes, halves, strict=True)))
    before = (tmp_path / "run/evaluation/before-forget.jsonl").read_text().splitlines()
    p = ks_2samp([json.loads(line)["truth_ratio"] for line in before], retrained_ratios(pair)).pvalue
    assert quality == pytest.approx(math.log(p))


def test_model_utility_of_tofus_sets(tiny, tiny_settings, tmp_path):
    sets = {"real_authors": tiny.world.retain[:3], "world_facts": tiny.world.retain[4:8]}
    for name, items in sets.items():
        lines = (json.dumps(item.to_json()) + "\n" for item in items)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    metrics = ["probability", "probability_w_options", "rouge_l", "truth_ratio"]
    files = {name: str(tmp_path / f"{name}.jsonl") for name in sets}
    own = {"output": str(tmp_path / "run"), "evaluate": {"metrics": metrics, "sets": files}}
    run(RunConfig.model_validate(merge(merge(tiny_settings, KNOWS), own)))
    with opened(tmp_path / "run", "cru", None, "") as pair:
        assert choose_measures(pair, None, None) == ("model_utility", "forgotten")
        measures = Measures(pair, "model_utility", "forgotten", pair.sets())
        (utility, forgotten), *_ = measures.of(*Hybrids(pair, "layer").become([]))
    table = {(row["set"], row["metric"]): row["before"] for row in load_result(tmp_path / "run").table}
    nine = []
    for name in ("retain", *sets):
        lines = (tmp_path / f"run/evaluation/before-{name}.jsonl").read_text().splitlines()
        ratios = [max(0.0, 1 - json.loads(line)["truth_ratio"]) for line in lines]
        probability = "probability" if name == "retain" else "probability_w_options"
        nine += [table[name, probability], table[name, "rouge_l"], sum(ratios) / len(ratios)]
    assert utility == pytest.approx(9 / sum(1 / value for value in nine))
    assert forgotten == pytest.approx(1 - table["forget", "probability"])
    result = calibrate_cru(tmp_path / "run", validation=0.4)
    assert result.counts == {"forget": 2, "retain": 3, "real_authors": 1, "world_facts": 2}


def test_what_has_forgotten_nothing_by_one_measure_is_told_the_other(folder, monkeypatch):
    monkeypatch.setattr(Measures, "of", lambda *_: [(0.5, -5.5)])
    with pytest.raises(ValueError, match=r"^forgetting=forgotten: the unlearned model has forgotten nothing[^;]*$"):
        calibrate_cru(folder, validation=0.4, forgetting="forgotten")
    monkeypatch.setattr("pyunlearn.runs.cru.retrained_ratios", lambda pair: [0.5, 0.6])
    with pytest.raises(ValueError, match=r"^forgetting=forget_quality: .*; by probabilities: --forgetting forgotten$"):
        calibrate_cru(folder, validation=0.4)
    shutil.rmtree(folder / "cru")  # such scores are kept


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"component": "layers"}, "component='layers': did you mean layer"),
        ({"target": 0.0}, "target=0: needs a share"),
        ({"validation": 1.0}, "validation=1: needs a share"),
        ({"validation": 0.9}, "takes 4 of 4 forget rows; needs some that are left"),
        ({"utility": "utility"}, "utility='utility': did you mean model_utility"),
        ({"utility": "model_utility", "validation": 0.4}, "needs sets retain, real_authors and world_facts"),
        ({"forgetting": "forget_quality", "validation": 0.4}, "needs truth ratios of a retrained model"),
    ],
)
def test_bad_input_of_cru(finished, options, error):
    with pytest.raises(ValueError, match=error):
        calibrate_cru(finished("full"), **options)
