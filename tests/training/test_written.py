"""Trainings on text that the model has written: which rows, which loss, and the same bits after a stop."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState

from pyunlearn import objectives as o
from pyunlearn.data import ForgetRetainDataset
from pyunlearn.metrics import sample_tokens
from pyunlearn.objectives import Samples
from pyunlearn.store import Store
from pyunlearn.training import written as module
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.terms import TermLosses, collect_needs, make_terms
from pyunlearn.training.unlearn import UnlearnData, unlearn
from pyunlearn.training.written import TRIES, Resample, alternates_of, samples_of, texts_of

from ..runs.test_run import press_at

STEPS = {"learning_rate": 1e-3, "batch_size": 4, "scheduler": "constant", "retain": []}


@pytest.fixture
def data(tiny):
    return UnlearnData(tiny.world.forget, tiny.world.retain, list(tiny.world.refusals))


def stage_in(folder, seed=3):
    return Stage(TrainingFolder(folder), seed=seed, max_length=256)


def bss(**options):
    own = {"samples": 2, "max_new_tokens": 6, **options}
    return [{"name": "bss", "options": own}]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_samples_are_the_models_very_tokens(tiny, tmp_path):
    stage, model = stage_in(tmp_path), tiny.model()
    wanted = Samples(count=3, temperature=0.8, max_new_tokens=7)
    rows = samples_of(stage, model, tiny.tokenizer, tiny.forget, wanted, texts_of(stage, model))
    prompts = [tiny.forget.prompt_format.prompt_ids(item.question) for item in tiny.world.forget]
    texts = sample_tokens(
        model, tiny.tokenizer, prompts, count=3, temperature=0.8, max_new_tokens=7, seed="3/sampling/0", progress=False
    )
    assert len(rows) == 3 * len(prompts)
    for index, row in enumerate(rows):
        prompt, tokens = prompts[index // 3], texts[index // 3][index % 3]
        assert row["index"] == index
        assert row["input_ids"].tolist() == prompt + tokens
        assert row["labels"].tolist() == [-100] * len(prompt) + tokens
    assert len({tuple(row["input_ids"].tolist()) for row in rows}) == len(rows)


def test_a_row_is_no_longer_than_rows_may_be(tiny, tmp_path):
    rows, model = copy.copy(tiny.forget), tiny.model()
    longest = max(len(rows.prompt_format.prompt_ids(item.question)) for item in rows.items)
    rows.max_length = longest + 4
    stage = stage_in(tmp_path)
    made = samples_of(stage, model, tiny.tokenizer, rows, Samples(1, 1.0, 30), Store(None))
    assert max(len(row["input_ids"]) for row in made) == longest + 4
    alternates = alternates_of(stage, model, tiny.tokenizer, rows, Samples(1, 1.0, 30), Store(None))
    assert max(len(alternates[i]["input_ids"]) for i in range(len(alternates))) <= longest + 4


def test_empty_samples_are_told(tiny, tmp_path, monkeypatch, caplog):
    eos = tiny.tokenizer.eos_token_id
    monkeypatch.setattr(module, "sample_tokens", lambda m, t, prompts, count, **k: [[[eos]] * count for _ in prompts])
    rows = samples_of(stage_in(tmp_path), tiny.model(), tiny.tokenizer, tiny.forget, Samples(2), Store(None))
    assert all(row["labels"][-1] == eos for row in rows)
    assert "samples: 16 of 16 are empty, the model ends at once" in caplog.text


def test_alternates_are_asked_for_and_put_to_the_question(tiny, tmp_path):
    stage, model = stage_in(tmp_path), tiny.model()
    rows = alternates_of(stage, model, tiny.tokenizer, tiny.forget, Samples(2, 1.0, 8), texts_of(stage, model))
    assert len(rows) == 2 * len(tiny.forget)
    for index in range(len(rows)):
        prompt = tiny.forget.prompt_format.prompt_ids(tiny.world.forget[index // 2].question)
        row = rows[index]
        assert row["input_ids"][: len(prompt)].tolist() == prompt
        assert (row["labels"] != -100).sum() > 1  # text and its end
    again = alternates_of(stage, model, tiny.tokenizer, tiny.forget, Samples(2, 1.0, 8), texts_of(stage, model))
    assert again.fingerprint == rows.fingerprint
    other = alternates_of(replace(stage, seed=4), model, tiny.tokenizer, tiny.forget, Samples(2, 1.0, 8), Store(None))
    assert other.fingerprint != rows.fingerprint


def test_an_empty_alternate_is_drawn_again_and_at_last_told(tiny, tmp_path, monkeypatch):
    eos, calls = tiny.tokenizer.eos_token_id, []
    word = tiny.tokenizer("word", add_special_tokens=False)["input_ids"]

    def drawing(full_at):
        def sample(model, tokenizer, prompts, count, seed, **options):
            calls.append((seed, len(prompts)))
            first = len(calls) == 1
            texts = [[[eos]] * count for _ in prompts]
            for i in range(len(prompts)):
                if len(calls) >= full_at or (first and i > 0):
                    texts[i] = [[*word, eos]] * count
            return texts

        return sample

    def make(full_at):
        calls.clear()
        monkeypatch.setattr(module, "sample_tokens", drawing(full_at))
        return alternates_of(stage_in(tmp_path), tiny.model(), tiny.tokenizer, tiny.forget, Samples(2), Store(None))

    assert len(make(3)) == 16
    assert calls == [("3/alternates/0", 8), ("3/alternates/1", 1), ("3/alternates/2", 1)]
    with pytest.raises(ValueError, match=rf"altpo: the model gives no other answer to .*, {TRIES} times an empty one"):
        make(TRIES + 1)


def test_a_question_too_long_to_be_asked_is_told(tiny, tmp_path):
    model = tiny.model()
    model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match=r"altpo: to ask for another answer to .* takes \d+ tokens, .* context is 40"):
        alternates_of(stage_in(tmp_path), model, tiny.tokenizer, tiny.forget, Samples(2), Store(None))


# ---- losses ----------------------------------------------------------------------------------------------------------


def nll(model, rows):
    """Of each row, (summed, tokens), by torch alone."""
    found = []
    for row in rows:
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        found.append((cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), int((labels != -100).sum())))
    return found


@pytest.mark.parametrize("of", ["ga", "npo"])
def test_the_loss_is_the_weighted_sum_over_answers_and_samples(tiny, tmp_path, of):
    """Value and gradient against the equation, with weight lambda / N for each of a prompt's N samples."""
    model, reference, weight = tiny.model().double(), tiny.model(1).double(), 0.3
    stage = stage_in(tmp_path)
    rows = samples_of(stage, model, tiny.tokenizer, tiny.forget, Samples(3, 1.0, 5), Store(None))
    pairs = ForgetRetainDataset(tiny.forget, together={"forget_sample": rows})
    terms = o.bss(of=of, weight=weight, samples=3, max_new_tokens=5, reduction="sequence_mean")
    losses = TermLosses(terms, reference if of == "npo" else None)
    batch = pairs.collate([pairs[i] for i in range(4)])
    counts = {term.count: 4 if term.kinds == {"answer": "forget"} else 12 for term in losses.terms}
    ours = sum(
        t.coefficient * loss for t, loss in zip(losses.terms, losses.term_losses(model, batch, counts), strict=True)
    )

    def each(row):
        ((total, _),) = nll(model, [row])
        if of == "ga":
            return -total
        with torch.no_grad():
            ((before, _),) = nll(reference, [row])
        return 2 / 0.1 * torch.log(1 + torch.exp(0.1 * (before - total)))

    theirs = sum((1 - weight) * each(tiny.forget[i]) for i in range(4)) / 4
    theirs = theirs + sum(weight / 3 * each(rows[3 * i + j]) for i in range(4) for j in range(3)) / 4
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_with_weight_0_it_is_its_f_to_the_bit(tiny, data, tmp_path):
    weights = []
    for name, forget in (("bss", bss(of="npo", weight=0)), ("npo", "npo")):
        model = tiny.model()
        unlearn(
            stage_in(tmp_path / name), UnlearnConfig(forget=forget, max_steps=3, **STEPS), model, tiny.tokenizer, data
        )
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "bss" / "texts").exists()


def test_altpo_is_dpo_on_the_alternates(tiny, data, tmp_path):
    """One pass over 2 x 8 pairs in one step: the step's loss is that of `dpo` on these rows."""
    forget = [{"name": "altpo", "options": {"alternates": 2, "max_new_tokens": 6, "beta": 0.3}}]
    settings = UnlearnConfig(forget=forget, epochs=1, **{**STEPS, "batch_size": 16})
    model, stage = tiny.model(), stage_in(tmp_path)
    unlearn(stage, settings, model, tiny.tokenizer, data)
    (row,) = read_metrics(stage.folder.metrics)
    assert row["forget.altpo/count"] == 16
    assert row["forget.altpo/loss"] == pytest.approx(2 / 0.3 * torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    start = tiny.model()
    alternates = alternates_of(stage, start, tiny.tokenizer, tiny.forget, Samples(2, 1.0, 6), texts_of(stage, start))
    now, before = model.double(), start.double()
    losses = TermLosses(["altpo"], before)
    pairs = ForgetRetainDataset(tiny.forget, apart={"forget_alternate": alternates})
    batch = pairs.collate([pairs[i] for i in range(16)])
    (ours,) = losses.term_losses(now, batch, {term.count: 16 for term in losses.terms})
    with torch.no_grad():
        sums = {
            name: [
                torch.stack([total for total, _ in nll(each, rows)])
                for rows in ([alternates[i] for i in range(16)], [tiny.forget[i] for i in range(8) for _ in range(2)])
            ]
            for name, each in (("now", now), ("before", before))
        }
    won, lost = (sums["before"][k] - sums["now"][k] for k in (0, 1))
    theirs = (-2 / 0.1 * torch.nn.functional.logsigmoid(0.1 * (won - lost))).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_whp_trains_on_generic_labels(tiny, data, tmp_path):
    settings = UnlearnConfig(forget="whp", max_steps=2, **STEPS)
    assert settings.reinforce is not None
    with pytest.raises(ValueError, match="reinforced: whp needs the model that was trained further"):
        unlearn(stage_in(tmp_path / "none"), settings, tiny.model(), tiny.tokenizer, data)
    stage, model = stage_in(tmp_path / "whp"), tiny.model()
    unlearn(stage, settings, model, tiny.tokenizer, data, reinforced=tiny.model(1))
    assert "forget.whp/loss" in read_metrics(stage.folder.metrics)[0]


def test_two_objectives_of_other_samples_are_refused():
    terms = [*o.bss(of="ga", samples=2), *o.bss(of="npo", samples=3)]
    with pytest.raises(ValueError, match="forget_sample: two objectives want other texts"):
        collect_needs(make_terms(terms))
    assert [term.label for term in make_terms([*o.bss(of="ga"), ("bss", 2.0)])] == [
        "forget.ga", "forget.ga.samples", "forget.bst", "forget.bst.samples",
    ]  # fmt: skip


# ---- on the way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["ga", "npo"])
@pytest.mark.parametrize("refresh", [0, 1, 2])
def test_samples_are_drawn_anew_by_the_model_as_it_is(tiny, data, tmp_path, refresh, of):
    settings = UnlearnConfig(forget=bss(of=of, refresh_epochs=refresh), epochs=4, save_steps=1, **STEPS)
    stage, model = stage_in(tmp_path), tiny.model()
    unlearn(stage, settings, model, tiny.tokenizer, data)
    folders = list((tmp_path / "texts").iterdir())
    assert len(folders) == {0: 1, 1: 4, 2: 2}[refresh]
    assert all(len(Store(folder).names()) == len(tiny.forget) for folder in folders)
    assert len(read_metrics(stage.folder.metrics)) == 8


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
@pytest.mark.parametrize("of", ["ga", "npo"])
def test_stopped_and_resumed_it_has_the_same_bits(tiny, data, tmp_path, monkeypatch, stop, of):
    """In the middle of an epoch, at its end before samples are drawn anew, and after."""
    settings = UnlearnConfig(forget=bss(of=of, refresh_epochs=2), epochs=5, save_steps=1, **STEPS)

    def run(folder):
        model = tiny.model()
        unlearn(stage_in(folder), settings, model, tiny.tokenizer, data)
        return model.state_dict(), read_metrics(folder / "metrics.jsonl")

    whole, rows = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", stop)
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped")
    resumed, again = run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_samples_that_are_gone_are_told(tiny, data, tmp_path, monkeypatch):
    settings = UnlearnConfig(forget=bss(of="ga", refresh_epochs=1), epochs=4, save_steps=1, **STEPS)
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 5)
        with pytest.raises(Interrupted):
            unlearn(stage_in(tmp_path), settings, tiny.model(), tiny.tokenizer, data)
    checkpoint = stage_in(tmp_path).folder.last_checkpoint("unlearn")
    by = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["Resample"]["attributes"][
        "by"
    ]
    next((tmp_path / "texts" / by).glob("*.json")).unlink()
    with pytest.raises(ValueError, match=rf"texts/{by}: lacks samples that .*checkpoint-\d+ goes on with"):
        unlearn(stage_in(tmp_path), settings, tiny.model(), tiny.tokenizer, data)


def test_how_rows_are_batched_does_not_matter(tiny, data, tmp_path):
    """Micro-batches of 2 x 2 and of 4, as the sums go: the same loss of the first step."""
    losses = []
    for size, accumulated in ((4, 1), (2, 2)):
        stage = stage_in(tmp_path / str(size))
        settings = UnlearnConfig(
            forget=bss(of="ga"), max_steps=1, gradient_accumulation_steps=accumulated, **{**STEPS, "batch_size": size}
        )
        unlearn(stage, settings, tiny.model(), tiny.tokenizer, data)
        losses.append(read_metrics(stage.folder.metrics)[0])
    for key in ("forget.ga/loss", "forget.ga.samples/loss", "loss"):
        assert losses[0][key] == pytest.approx(losses[1][key], rel=1e-5)
    assert (
        losses[0]["forget.ga.samples/count"] == losses[1]["forget.ga.samples/count"] > losses[0]["forget.ga/count"] / 9
    )


def test_workers_that_outlive_an_epoch_are_refused(tiny, data, tmp_path):
    arguments = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    settings = UnlearnConfig(forget=bss(of="ga"), epochs=2, arguments=arguments, **STEPS)
    with pytest.raises(ValueError, match="dataloader_persistent_workers keeps the first epoch's samples"):
        unlearn(stage_in(tmp_path), settings, tiny.model(), tiny.tokenizer, data)


def test_workers_see_the_samples_drawn_anew(tiny, data, tmp_path):
    models = []
    for workers in (0, 1):
        settings = UnlearnConfig(
            forget=bss(of="ga", refresh_epochs=1), epochs=2, arguments={"dataloader_num_workers": workers}, **STEPS
        )
        models.append(model := tiny.model())
        unlearn(stage_in(tmp_path / str(workers)), settings, model, tiny.tokenizer, data)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_checkpoint_of_a_training_that_drew_none_is_told(tiny, tmp_path):
    pairs = ForgetRetainDataset(tiny.forget)
    callback = Resample(stage_in(tmp_path), tiny.tokenizer, pairs, Samples(1, refresh_epochs=1), Store(None))
    args, state = SimpleNamespace(dataloader_persistent_workers=False), TrainerState(global_step=2)
    with pytest.raises(ValueError, match="the checkpoint has no state of the samples"):
        callback.on_train_begin(args, state, TrainerControl(), model=tiny.model())
