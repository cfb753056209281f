"""`pyunlearn score`'s job on the tiny world: its files, its report, stopping and going on."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from rich.console import Console

import pyunlearn as pu
from pyunlearn.data import QADataset, collate
from pyunlearn.model.load import load_model
from pyunlearn.mrd import MRDResult
from pyunlearn.report.score import ordered, render_score_report, running, self_checks, thirds
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.job import load_data
from pyunlearn.runs.score import score
from pyunlearn.store import Store

DRAWS = 6


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_settings):
    from pyunlearn.runs.config import RunConfig
    from pyunlearn.training.settings import merge

    folder = tmp_path_factory.mktemp("score") / "run"
    config = RunConfig.model_validate(merge(tiny_settings, {"output": str(folder)}))
    return config, score(config, num_draws=DRAWS, batch_size=2)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_are_those_of_pu_mrd(scored):
    config, result = scored
    assert result.out == config.folder / "scores.jsonl"
    names = {path.name for path in config.folder.iterdir()}
    assert {"config.yaml", "memorised", "scores.jsonl", "scores.json", "scores.html", "scores.state"} <= names
    records = read(result.out)
    assert records == result.records
    assert json.loads(result.out.with_suffix(".json").read_text()) == result.diagnostics

    model, tokenizer = load_model(str(config.folder / "memorised"))
    rows = QADataset(load_data(config).forget, tokenizer, 256)
    batch = collate([rows[i] for i in range(len(rows))], 0)
    direct = pu.mrd(model, [batch], num_draws=DRAWS, batch_size=2, progress=False)
    assert [record["mrd"] for record in records] == direct.value.tolist()
    assert [record["standard_error"] for record in records] == direct.standard_error.tolist()
    assert [record["num_tokens"] for record in records] == direct.num_tokens.tolist()
    assert [record["question"] for record in records] == [item.question for item in rows.items]
    for record in records:
        assert record["probability"] == pytest.approx(math.exp(-record["nll"] / record["num_tokens"]))


def test_whole_samples(scored, tmp_path, capsys):
    config, answers = scored
    options = {"estimator": "gradient", "batch_size": 2}
    result = score(config, labels="all", out=tmp_path / "all.jsonl", console=Console(), **options)
    model, tokenizer = load_model(str(config.folder / "memorised"))
    rows = QADataset(load_data(config).forget, tokenizer, 256)
    batch = collate([rows[i] for i in range(len(rows))], 0)
    direct = pu.mrd(model, [{**batch, "labels": batch["input_ids"]}], progress=False, **options)
    assert [record["mrd"] for record in result.records] == direct.value.tolist()
    lengths = batch["attention_mask"].sum(1) - 1
    assert [record["num_tokens"] for record in result.records] == lengths.tolist()
    assert result.diagnostics["labels"] == "all"
    assert answers.diagnostics["labels"] == "answers"
    assert "scored tokens, questions and answers;" in result.report.read_text()
    assert "scored tokens of the answers;" in answers.report.read_text()
    assert f"gradient of {len(rows)} samples, questions and answers, hardest" in capsys.readouterr().out
    message = r"all\.jsonl: is of other scores.*--out FILE\n.*all\.state belongs to another job \(data: "
    with pytest.raises(ValueError, match=message):
        score(config, out=tmp_path / "all.jsonl", **options)
    with pytest.raises(ValueError, match="labels='al': did you mean all"):
        score(config, labels="al")


def test_the_report_stands_alone(scored):
    _, result = scored
    html = result.report.read_text()
    assert html.count("<svg") == 11  # 2 of the distribution, 2 of the convergence, sigma, 6 characteristics
    assert not re.search(r"<link|<img|src=|url\((?!#)|@import|href=(?!\"(#|data:text/csv))", html)
    assert html.count("<script") == 1
    ends = [f"{end} to unlearn" for end in ("Hardest", "Easiest")]
    ends = ends if ordered(result.records) else ["Lowest scores", "Highest scores"]
    for title in ("Distribution", "Convergence", "Characteristics", *ends):
        assert title in html
    hardest = min(result.records, key=lambda record: record["mrd"])
    assert html.index(hardest["question"].replace("'", "&#39;")) < html.index(ends[1])


def test_stopped_and_called_again_it_ends_the_same(scored, tmp_path, monkeypatch):
    config, whole = scored
    put, out = Store.put, tmp_path / "again.jsonl"

    def stop(store, unit, values, identity):
        put(store, unit, values, identity)
        raise KeyboardInterrupt

    options = {"out": out, "num_draws": DRAWS, "batch_size": 2}
    monkeypatch.setattr(Store, "put", stop)
    with pytest.raises(KeyboardInterrupt, match="resume with: pyunlearn score --here") as stopped:
        score(config, command="pyunlearn score --here", **options)
    assert stopped.value.exit_code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"again.state"}
    monkeypatch.setattr(Store, "put", put)
    again = score(config, **options)
    assert again.records == whole.records
    assert out.read_bytes() == whole.out.read_bytes()
    with pytest.raises(ValueError, match=r"again\.state belongs to another job \(seed: 0 -> 1\)"):
        score(config, seed=1, **options)
    assert score(config, seed=1, overwrite=True, **options).records != whole.records


def test_another_configuration_is_told_a_way_that_score_has(scored):
    config, _ = scored
    with pytest.raises(
        FileExistsError, match=r"another configuration.*; choose another folder by --set output=FOLDER$"
    ):
        score(config.model_copy(update={"seed": config.seed + 1}), num_draws=DRAWS)


@pytest.mark.parametrize("estimator", ["gradient", "definition"])
def test_files_and_other_estimators(scored, tmp_path, estimator, capsys):
    config, whole = scored
    data = tmp_path / "data.jsonl"
    data.write_text(whole.out.read_text())  # its records have question and answer
    options = {"estimator": estimator, "num_draws": DRAWS, "normalize": "tokens", "console": Console()}
    files = FilesConfig.of(str(config.folder / "memorised"), str(data))
    result = score(files, out=tmp_path / "x" / "y.jsonl", **options)
    records = read(tmp_path / "x" / "y.jsonl")
    assert [record["index"] for record in records] == list(range(len(whole.records)))
    told = capsys.readouterr().out
    order = "hardest to unlearn first" if ordered(records) else "lowest first: their errors leave no order"
    words = " ".join(told.split())
    assert f"{estimator} of {len(records)} samples, {order}" in words
    assert f"of the model {config.folder / 'memorised'}" in words
    assert f"--forget {data} --retain RETAIN --recipe npo+mrd" in words
    assert "y.html" in told.replace("\n", "")
    html = result.report.read_text()
    if estimator == "gradient":
        assert all(record["standard_error"] is None for record in records)
        assert "Convergence" not in html
        assert "standard error" not in told
        assert "within about 1 % of Algorithm 1" in told
    else:
        assert "Convergence" in html
        assert "expected 4" in told


def test_running_estimates_end_in_the_result():
    torch.manual_seed(0)
    draws = torch.randn(40, 3, dtype=torch.float64) + 0.3
    for absolute in (True, False):
        mean, error = running(draws, absolute)
        x = draws.abs() if absolute else draws
        for k in (2, 17, 40):
            torch.testing.assert_close(mean[k - 2], x[:k].mean(0).abs())
            torch.testing.assert_close(error[k - 2], x[:k].std(0) / math.sqrt(k))


def test_thirds_hold_every_sample_once():
    assert thirds([3, 1, 2, 6, 5, 4], [30, 10, 20, 60, 50, 40]) == [[10, 20], [30, 40], [60, 50]]
    assert thirds([1, 1, 1, 1], [4, 3, 2, 1]) == [[4, 3, 2, 1], [], []]
    assert [len(group) for group in thirds(list(range(9)), list(range(9)))] == [3, 3, 3]


def test_what_a_file_says_is_escaped_and_bad_checks_are_marked():
    told = {
        "estimator": "algorithm1", "num_draws": 2, "sigma": 1e-5, "seed": 0, "num_samples": 2, "num_tokens": 4,
        "sigma_ratio": 1.1, "expected_ratio": 2.0, "noise_share": 0.7, "by_heart_share": 0.9, "share_linear_ok": 1.0,
        "normalize": None, "made": {"command": "pyunlearn score"},
    }  # fmt: skip
    assert [check["met"] for check in self_checks(told)] == [False, False, False]
    record = {
        "index": 0, "question": "<script>alert(1)</script>", "answer": "A & B", "mrd": 1e-3, "standard_error": 1e-4,
        "num_tokens": 2, "probability": 0.5, "lexical_diversity": 1.0, "sentence_length": 2.0, "word_frequency": 0.0,
        "rare_words": 1.0,
    }  # fmt: skip
    values = torch.tensor([1e-3, 2e-3], dtype=torch.float64)
    draws = torch.tensor([[1e-3, -2e-3], [-1e-3, 2e-3]], dtype=torch.float64)
    result = MRDResult(values, values / 10, torch.tensor([2, 2]), values < 1, draws, told)
    made = {"command": "pyunlearn score --name '<b>'", "model": "m", "data": "d"}
    html = render_score_report([record, {**record, "mrd": 2e-3}], result, made)
    assert "<script>alert" not in html
    assert "&lt;script&gt;" in html
    assert "<b>'" not in html
    assert html.count('class="missed') == 3  # all but the lengths, which do not vary
