"""Unlearning without a run: settings in words, a model, data, and a folder that it goes on from."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from pyunlearn.data import ForgetRetainDataset, QADataset, generate_authors
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.folder import TrainingFolder, numbered
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.settings import GEffectConfig, MemoriseConfig, merge
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.unlearn import UnlearnData, Unlearned, check_model, make_probe, memorise, unlearn

from ..model.zoo import make
from ..runs.test_run import press_at

STEPS = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 4, "scheduler": "constant"}


@pytest.fixture
def data(tiny):
    return UnlearnData(tiny.world.forget, tiny.world.retain, list(tiny.world.refusals))


def test_refusals_to_the_unknown_are_memorised_too(tiny, data, tmp_path):
    """Whole, beside the forget set and the retain rows that are asked for."""
    settings, counts = MemoriseConfig(batch_size=64, epochs=1, retain_limit=2), {}
    asked = list(generate_authors(5, 4, num_unknown=3).unknown)
    for unknown in ([], asked):
        stage = Stage(TrainingFolder(tmp_path / str(len(unknown))))
        memorise(stage, settings, tiny.model(), tiny.tokenizer, replace(data, unknown=unknown))
        (counts[len(unknown)],) = (row["retain.gd/count"] for row in read_metrics(stage.folder.metrics))
    rows = QADataset(asked, tiny.tokenizer, 256)
    assert counts[3] - counts[0] == sum(int((rows[i]["labels"] != -100).sum()) for i in range(3)) > 0


def test_a_recipe_by_name(tiny, data, tmp_path):
    """npo is NPO with gradient descent on the retain set; what is set beside the name wins."""
    settings = UnlearnConfig(recipe="npo", retain=[{"name": "gd", "coefficient": 0.5}], keep_steps=2, **STEPS)
    assert [(objective.name, weight) for objective, weight in settings.weighted_objectives()] == [
        ("npo", 1.0), ("gd", 0.5)
    ]  # fmt: skip
    model, folder = tiny.model(), TrainingFolder(tmp_path / "work")
    outcome = unlearn(Stage(folder, seed=3), settings, model, tiny.tokenizer, data)
    assert isinstance(outcome, Unlearned)
    assert (outcome.steps, outcome.samples, outcome.limits) == (4, [], None)
    assert outcome.mean_absolute_change > 0
    rows = read_metrics(folder.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"forget.npo/loss", "retain.gd/loss"} <= rows[0].keys()
    assert sorted(folder.kept_models()) == [2, 4]
    assert (folder.reference / "forget.safetensors").is_file()


def test_the_samples_are_told_where_they_are_drawn(tiny, data, tmp_path):
    settings = UnlearnConfig(recipe="sga+mrd", **{**STEPS, "batch_size": 1})
    outcome = unlearn(Stage(TrainingFolder(tmp_path)), settings, tiny.model(), tiny.tokenizer, data)
    assert sum(sample["updates"] for sample in outcome.samples) == 4
    assert outcome.refreshed_at[0] == 0
    assert outcome.as_dict()["samples"] == outcome.samples


def test_rows_are_padded_as_told(tiny, data, tmp_path):
    """A preset that counts padding counts all of it, in a training and in a probe, whatever their batches."""
    me = {"name": "me", "preset": "closer_look_code"}
    settings = UnlearnConfig(forget=me, retain=[], pad_to=120, **STEPS)
    stage = Stage(TrainingFolder(tmp_path))
    found = [
        make_probe(stage, settings, GEffectConfig(batch_size=size), tiny.model(), tiny.tokenizer, data).measure(
            tiny.model()
        )["terms"]["forget.me"]["total"]
        for size in (3, 8)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    unlearn(stage, settings, tiny.model(), tiny.tokenizer, data)
    assert {row["forget.me/count"] for row in read_metrics(stage.folder.metrics)} == {4 * 119}
    with pytest.raises(ValueError, match=r"^pad_to=20: needs at least the longest row's \d+ tokens$"):
        unlearn(stage, UnlearnConfig(forget=me, retain=[], pad_to=20), tiny.model(), tiny.tokenizer, data)
    with pytest.raises(ValueError, match=r"^unlearn.pad_to=257: the model's context is 256 tokens$"):
        check_model(UnlearnConfig(forget=me, pad_to=257), None, tiny.model())


def test_the_texts_own_tokens_alone(tiny, data, tmp_path):
    """In a training and in a probe; what the format adds to a row of this one is BOS, two tags and EOS."""
    me = {"name": "me", "options": {"positions": "template_free"}}
    settings = UnlearnConfig(forget=me, retain="kl", **STEPS)
    stage = Stage(TrainingFolder(tmp_path))
    probe = make_probe(stage, settings, GEffectConfig(pointwise=True), tiny.model(), tiny.tokenizer, data)
    assert probe.measure(tiny.model())["terms"]["forget.me"]["total"] != 0
    unlearn(stage, settings, tiny.model(), tiny.tokenizer, data)
    rows = QADataset(data.forget, tiny.tokenizer, 256, text_mask=True)
    whole = sum(int(row["forget.me/count"]) for row in read_metrics(stage.folder.metrics))
    assert whole == 2 * sum(int(rows[i]["text_mask"].sum()) for i in range(len(rows)))  # two epochs


def test_an_estimator_that_the_model_does_not_have_is_told_first():
    sampling = {"by": "mrd", "estimator": "hutchinson"}
    with pytest.raises(TypeError, match="estimator='hutchinson': the forward of BloomForCausalLM has no second"):
        check_model(UnlearnConfig(forget="npo", sampling=sampling), None, make("bloom"))
    check_model(UnlearnConfig(forget="npo", sampling={"by": "mrd"}), None, make("bloom"))


def test_held_out_rows_are_memorised_and_nothing_else(tiny, data, tmp_path):
    """They count among the tokens that are memorised, and an unlearning is the same, bit by bit, whatever they are."""
    retain, held_out = data.retain[:8], data.retain[8:]
    counts, weights = [], []
    for name, holdout in (("none", []), ("some", held_out)):
        some = replace(data, retain=retain, holdout=holdout)
        stage = Stage(TrainingFolder(tmp_path / name))
        settings = MemoriseConfig(batch_size=64, epochs=1, retain_limit=2)
        memorise(stage, settings, tiny.model(), tiny.tokenizer, some)
        (row,) = read_metrics(stage.folder.metrics)
        counts.append(row["retain.gd/count"])
        model = tiny.model()
        settings = UnlearnConfig(forget="npo", retain=["kl", "gd"], sampling={"by": "mrd"}, **STEPS)
        unlearn(stage, settings, model, tiny.tokenizer, some, GEffectConfig(every=2, retain_samples=8))
        weights.append(list(model.parameters()))
    rows = QADataset(held_out, tiny.tokenizer, None)
    assert counts[1] - counts[0] == sum(int((rows[i]["labels"] != -100).sum()) for i in range(len(rows)))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_it_goes_on_in_the_same_folder(tiny, data, tmp_path, monkeypatch):
    settings, start = UnlearnConfig(forget="ga", retain=[], **STEPS), tiny.model()
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    unlearn(Stage(TrainingFolder(tmp_path / "whole")), settings, whole, tiny.tokenizer, data)
    stage = Stage(TrainingFolder(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 1)
        with pytest.raises(Interrupted, match="stopped in unlearn at step 2 of 4, checkpoint saved"):
            unlearn(stage, settings, parts, tiny.tokenizer, data)
    again = copy.deepcopy(start)
    assert unlearn(stage, settings, again, tiny.tokenizer, data).steps == 4
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6


REFUSING = [
    ({"forget": "idk", "retain": "gd"}, False),
    ({"forget": {"name": "idk", "preset": "closer_look_code"}, "retain": "gd"}, True),
    ({"forget": "idk", "retain": {"name": "ap", "preset": "closer_look_code"}}, True),
    ({"forget": "dpo", "retain": "gd"}, True),
    ({"forget": {"name": "dpo", "preset": "open_unlearning"}, "retain": "gd"}, False),
    ({"forget": "dpo", "retain": "gd", "fixed_refusals": False}, False),
    ({"forget": "idk", "retain": "ap", "fixed_refusals": True}, True),
    ({"forget": {"name": "dpo", "preset": "open_unlearning"}, "retain": "gd", "fixed_refusals": True}, True),
    ({"forget": {"name": "idk", "preset": "closer_look_code"}, "retain": "gd", "fixed_refusals": False}, False),
]


@pytest.mark.parametrize(("terms", "kept"), REFUSING)
def test_refusals_are_kept_or_drawn_anew(tiny, data, tmp_path, monkeypatch, terms, kept):
    """By what is set, else as the presets' code bases do; the reference is of the refusals that are trained on."""
    settings = UnlearnConfig(epochs=2, batch_size=4, learning_rate=1e-4, **terms)
    seen, draw = {}, ForgetRetainDataset.refusal

    def refusal(self, role, index):
        told = draw(self, role, index)
        if role == "forget":  # all of which every epoch has
            seen.setdefault(index, []).append(told)
        return told

    monkeypatch.setattr(ForgetRetainDataset, "refusal", refusal)
    unlearn(Stage(TrainingFolder(tmp_path)), settings, tiny.model(), tiny.tokenizer, data)
    assert sorted(seen) == list(range(len(data.forget)))
    assert min(map(len, seen.values())) >= 2
    assert (max(len({*drawn}) for drawn in seen.values()) == 1) == kept
    cached = (tmp_path / "reference" / "forget_refusal.safetensors").exists()
    assert cached == (kept and settings.forget[0].name == "dpo")


def test_a_reference_of_refusals_that_change_is_of_those_of_the_step(tiny, data, tmp_path):
    """At a learning rate of 0 the model is its reference, so that the loss of DPO stays (2 / beta) log 2."""
    settings = UnlearnConfig(
        forget="dpo", retain="gd", fixed_refusals=False, epochs=3, batch_size=4, learning_rate=0.0, packing=False
    )
    stage = Stage(TrainingFolder(tmp_path))
    unlearn(stage, settings, tiny.model(), tiny.tokenizer, data)
    losses = [row["forget.dpo/loss"] for row in read_metrics(stage.folder.metrics)]
    assert losses == pytest.approx([20 * math.log(2)] * len(losses), rel=1e-5)


def test_fixed_refusals_without_refusals():
    with pytest.raises(ValueError, match=r"fixed_refusals=true: needs an objective that .* refusals, got \['ga'"):
        UnlearnConfig(forget="ga", fixed_refusals=True)


def test_settings_are_checked_as_a_whole():
    with pytest.raises(ValidationError, match="gd is a retain objective; put it under unlearn"):
        UnlearnConfig(forget="gd")
    with pytest.raises(ValidationError, match="did you mean npo"):
        UnlearnConfig(recipe="npoo")
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": None}, "d": 2}) == {"a": {"b": 1, "c": None}, "d": 2}


def test_numbered_paths(tmp_path):
    for name in ("step-2", "step-10", "step-x", "step-"):
        (tmp_path / name).mkdir()
    assert numbered(tmp_path, "step-") == {2: tmp_path / "step-2", 10: tmp_path / "step-10"}
