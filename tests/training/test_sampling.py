"""Forget samples drawn by weight: what is drawn, how it goes on after a stop, and when a sample is forgotten."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import pyunlearn as pu
from pyunlearn.data import QADataset, collate
from pyunlearn.metrics import extraction_likelihood, teacher_forced
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import Interrupt, read_metrics
from pyunlearn.training.sampling import ForgetSampler, Forgotten
from pyunlearn.training.stage import Interrupted
from pyunlearn.training.trainer import UnlearnTrainer

from ..runs.test_run import press_at


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_scores(model, rows):
    return pu.mrd(model, [collate([rows[i]], 0) for i in range(len(rows))], "gradient", progress=False).value.tolist()


def train(tiny, args, terms, model=None, callbacks=(), resume=None, pairs=None, reference=None, **options):
    """(trainer, sampler, parameters after training)."""
    pairs = tiny.pairs() if pairs is None else pairs
    sampler = ForgetSampler(pairs.forget, **options)
    trainer = UnlearnTrainer(
        model=tiny.model() if model is None else model, args=args, train_dataset=pairs, objectives=terms,
        reference=reference, sampler=sampler, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, sampler, parameters(trainer.model)


def scored(tiny, scores, **options):
    sampler = ForgetSampler(tiny.forget, **options)
    sampler.memory.scores = scores
    return sampler


def test_whole_samples_are_scored_where_asked_for(tiny):
    sampler = ForgetSampler(tiny.forget, labels="all")
    model = tiny.model().eval()
    sampler.refresh(model, 0)
    batches = [collate([tiny.forget[i]], 0) for i in range(len(tiny.forget))]
    whole = pu.mrd(model, [{**b, "labels": b["input_ids"]} for b in batches], "gradient", progress=False)
    assert sampler.memory.scores == whole.value.tolist() != gradient_scores(model, tiny.forget)
    with pytest.raises(ValueError, match="labels='al': did you mean all"):
        ForgetSampler(tiny.forget, labels="al")


def test_probabilities_are_those_of_the_paper(tiny):
    scores = [0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 1.0]
    easy = scored(tiny, scores).probabilities()
    assert easy == pytest.approx([score / 8 for score in scores])
    inverse = scored(tiny, scores, weighting="inverse").probabilities()
    total = sum(1 / score for score in scores)
    assert inverse == pytest.approx([1 / score / total for score in scores])
    assert ForgetSampler(tiny.forget, None).probabilities() == [1 / 8] * 8
    some = scored(tiny, scores)
    some.memory.forgotten_at[6] = 5
    assert some.active == [0, 1, 2, 3, 4, 5, 7]
    assert some.probabilities() == pytest.approx([score / 5 for i, score in enumerate(scores) if i != 6])


def test_draws_follow_the_weights_and_are_a_function_of_seed_and_step(tiny):
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]
    sampler = scored(tiny, scores, seed=3)
    drawn = [sampler.draw(step, 40) for step in range(200)]
    count, expected = sum(map(len, drawn)), [score / 28 for score in scores]
    for updates, p in zip(sampler.memory.updates, expected, strict=True):
        assert abs(updates - count * p) <= 4.5 * math.sqrt(count * p * (1 - p))
    assert [place for step in drawn for _, place in step] == list(range(count))
    again = scored(tiny, scores, seed=3)
    assert [index for index, _ in again.draw(7, 40)] == [index for index, _ in drawn[7]]
    assert [index for index, _ in scored(tiny, scores, seed=4).draw(7, 40)] != [index for index, _ in drawn[7]]


def test_scores_are_refreshed_by_the_model_as_it_is(tiny, arguments):
    args = arguments(max_steps=5, per_device_train_batch_size=2)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = gradient_scores(model, tiny.forget)

    before = gradient_scores(tiny.model(), tiny.forget)
    _, sampler, _ = train(tiny, args, ["ga"], callbacks=[Look()], refresh_steps=2)
    assert sampler.memory.refreshed_at == [0, 2, 4]
    assert sampler.memory.first_scores == pytest.approx(before, rel=1e-6)
    assert sampler.memory.scores == pytest.approx(seen[4], rel=1e-6)
    assert sampler.memory.scores != pytest.approx(before, rel=1e-3)
    assert sum(sampler.memory.updates) == sampler.memory.draws == 10


TERMS = [["ga"], ["npo", "gd"], ["idk", "gd"], ["wga", "kl"], ["dpo", "ap"]]


@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_any_objective_trains_on_what_was_drawn(tiny, arguments, monkeypatch, terms):
    """Also that micro-batches do not matter: 4 x 1 and 1 x 4 end the same."""
    drawn = []
    original = UnlearnTrainer.term_losses

    def spy(self, model, inputs, counts):
        drawn.append({kind: batch["index"].tolist() for kind, batch in inputs.items()})
        return original(self, model, inputs, counts)

    monkeypatch.setattr(UnlearnTrainer, "term_losses", spy)
    kinds = {"refuse": ("forget", "retain"), "fixed_refusals": True} if {"idk", "dpo", "ap"} & set(terms) else {}
    ends = []
    for size, accumulation in ((4, 1), (1, 4)):
        drawn.clear()
        args = arguments(max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        pairs = tiny.pairs(**kinds)
        _, sampler, after = train(tiny, args, terms, pairs=pairs, reference=tiny.model(seed=1), refresh_steps=2)
        ends.append(after)
        indices = [index for batch in drawn for index in batch["forget"]]
        assert [indices.count(i) for i in range(8)] == sampler.memory.updates
        places = [pairs.pair(index, place)["retain"]["index"] for place, index in enumerate(indices)]
        assert [index for batch in drawn for index in batch["retain"]] == places
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=5e-6)
    assert (ends[0] - parameters(tiny.model())).abs().max() > 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_it_ends_bit_for_bit(tiny, arguments, tmp_path, accumulation):
    changes = {"max_steps": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation,
               "optim": "adamw_torch", "learning_rate": 3e-3}  # fmt: skip
    options = {"refresh_steps": 2, "seed": 5, "forgotten": Forgotten(ngram=3, share=0.9, every_steps=3)}
    model = memorised(tiny)

    def copy():
        other = tiny.model()
        other.load_state_dict(model.state_dict())
        return other

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    _, whole, expected = train(tiny, arguments(**changes), ["ga", "gd"], copy(), **options)
    with Interrupt() as interrupt:
        first, early, _ = train(
            tiny, arguments(**changes), ["ga", "gd"], copy(), callbacks=[Press(), interrupt], **options
        )
    assert first.state.global_step == 5
    assert early.memory.draws < whole.memory.draws
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    _, resumed, after = train(tiny, arguments(**changes), ["ga", "gd"], copy(), resume=checkpoint, **options)
    assert resumed.memory == whole.memory
    assert any(step is not None for step in whole.memory.forgotten_at)  # the stop was resumed too
    assert torch.equal(after, expected)


def memorised(tiny, steps=120):
    """The tiny model after learning the forget rows by heart."""
    model = tiny.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate([tiny.forget[i] for i in range(len(tiny.forget))], 0)
    batch.pop("index")
    for _ in range(steps):
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def accuracies(model, rows):
    return [row["memorization_accuracy"] for row in teacher_forced(model, rows, progress=False)]


def test_a_limit_of_nothing_is_met_by_nothing(tiny, caplog):
    """EL is 0 for the model of random weights: no sample could ever be below."""
    rule = Forgotten(ngram=10)
    limits = rule.limits(tiny.model(), tiny.forget)
    assert limits["el"] == 0
    assert [record.message for record in caplog.records].count(
        "early_stop: the mean EL is 0 before unlearning; nothing is below, so 0 is low"
    ) == 1
    everyone = list(range(len(tiny.forget)))
    assert rule.among(everyone, tiny.model(), tiny.forget, {"el": 0.0, "ma": 2.0}) == everyone
    assert rule.among(everyone, tiny.model(), tiny.forget, {"el": 0.0, "ma": 0.0}) == [
        i for i, row in enumerate(teacher_forced(tiny.model(), tiny.forget, progress=False))
        if row["memorization_accuracy"] == 0
    ]  # fmt: skip


def test_what_is_measured_knows_nothing_of_the_trainings_precision(tiny, arguments):
    """MRD in half precision would be its own rounding."""
    found = []
    for bf16 in (False, True):
        args = arguments(max_steps=2, per_device_train_batch_size=2, learning_rate=0.0, bf16=bf16)
        _, sampler, _ = train(tiny, args, ["ga"], refresh_steps=1, forgotten=Forgotten(ngram=1, every_steps=1))
        found.append((sampler.memory.scores, sampler.memory.first_scores, sampler.memory.limits))
        assert sampler.memory.refreshed_at == [0, 1]
    assert found[0] == found[1]


def test_a_second_training_begins_anew(tiny, arguments):
    args = arguments(max_steps=2, per_device_train_batch_size=2, learning_rate=0.0)
    trainer, sampler, _ = train(tiny, args, ["ga"])
    first = sampler.records()
    trainer.train()
    assert sampler.records() == first
    assert sampler.memory.draws == 4


def test_forgotten_samples_are_not_drawn_and_the_last_one_ends_it(tiny, arguments):
    model, drawn = memorised(tiny), []
    rule = Forgotten(ngram=3, share=0.8, every_steps=2)
    start = tiny.model()
    start.load_state_dict(model.state_dict())

    class Look(TrainerCallback):
        """Both metrics of every sample, at every look, by the metrics themselves."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % 2 == 0:
                accuracy = [row["memorization_accuracy"] for row in teacher_forced(model, tiny.forget, progress=False)]
                drawn.append(
                    (state.global_step, accuracy, extraction_likelihood(model, tiny.tokenizer, tiny.forget, ngram=3))
                )

    args = arguments(max_steps=200, per_device_train_batch_size=1, optim="adamw_torch", learning_rate=3e-3)
    trainer, sampler, _ = train(tiny, args, ["ga"], start, callbacks=[Look()], forgotten=rule, refresh_steps=3)
    memory = sampler.memory
    assert memory.limits["ma"] == pytest.approx(0.8 * sum(accuracies(model, tiny.forget)) / 8)
    assert memory.limits["el"] > 0.5
    assert trainer.state.global_step == max(memory.forgotten_at) < 200
    expected = [None] * 8
    for step, accuracy, likelihood in drawn:
        for i in range(8):
            if expected[i] is None and accuracy[i] < memory.limits["ma"] and likelihood[i] < memory.limits["el"]:
                expected[i] = step
    assert memory.forgotten_at == expected
    assert trainer.state.log_history[-2]["sampling/draws"] == memory.draws == sum(memory.updates)
    assert len(set(expected)) > 1  # not all at once


def test_bad_input_is_named(tiny, arguments, tmp_path):
    for options, message in (
        ({"weighting": "rank"}, "weighting='rank': needs one of"),
        ({"refresh_steps": 0}, "refresh_steps=0: needs a whole number >= 1"),
        ({"scores": {"estimator": "gradiant"}}, "estimator='gradiant': did you mean gradient"),
        ({"scores": {"sigma": 0.0}}, "sigma=0.0: needs a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ForgetSampler(tiny.forget, **options)
    with pytest.raises(ValueError, match="sample 7 has MRD 0: weighting='inverse' needs MRD > 0"):
        scored(tiny, [1.0] * 7 + [0.0], weighting="inverse").probabilities()
    with pytest.raises(ValueError, match=r"of 8 samples add up to 0\.0: nothing can be drawn"):
        scored(tiny, [0.0] * 8).probabilities()
    for options, message in (({"ngram": 0}, "ngram=0"), ({"share": 0.0}, "share=0.0"), ({"share": 1.5}, "share=1.5")):
        with pytest.raises(ValueError, match=message):
            Forgotten(**options)
    other = QADataset(tiny.world.forget, tiny.tokenizer, 256)
    with pytest.raises(ValueError, match="sampler: needs the forget rows of a ForgetRetainDataset"):
        UnlearnTrainer(
            model=tiny.model(), args=arguments(), train_dataset=tiny.pairs(), objectives=["ga"],
            sampler=ForgetSampler(other),
        )  # fmt: skip
    args = arguments(max_steps=2, per_device_train_batch_size=2, save_strategy="steps", save_steps=1)
    UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=["ga"]).train()
    with pytest.raises(ValueError, match="the checkpoint has no state of the sampler"):
        train(tiny, args, ["ga"], resume=str(tmp_path / "out" / "checkpoint-1"))
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, in which sigma=1e-05 drowns in rounding"):
        train(tiny, arguments(), ["ga"], tiny.model().bfloat16())


def test_a_run_stopped_and_resumed_ends_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    unlearn = {"recipe": "npo+mrd", "sampling": {"refresh_steps": 2}, "max_steps": 7}
    config, whole = (tiny_config({"unlearn": unlearn, "output": str(tmp_path / name)}) for name in ("run", "whole"))
    run(whole)
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 3)
        with pytest.raises(Interrupted, match="stopped in unlearn at step 4 of 7"):
            run(config)
    run(config, resume=True)
    ours, theirs = ((one.folder / "unlearning.json").read_text() for one in (config, whole))
    assert ours == theirs
    assert json.loads(ours)["refreshed_at"] == [0, 2, 4, 6]
    weights = [load_file(one.folder / "checkpoint" / "model.safetensors") for one in (config, whole)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("recipe", "labels", "scored"),
    [("cga", "answers", "the answers"), ("GradDiff+MRD", "all", "questions and answers")],
)
def test_a_whole_run(tiny_config, recipe, labels, scored):
    unlearn = {"recipe": recipe, "early_stop": {"ngram": 2, "every_steps": 1}, "learning_rate": 1e-2, "max_steps": 12,
               "sampling": {"refresh_steps": 2, "labels": labels}}  # fmt: skip
    config = tiny_config({"memorise": {"epochs": 40, "learning_rate": 1e-2}, "unlearn": unlearn})
    result = run(config)
    told = json.loads((result.folder / "unlearning.json").read_text())
    assert told["mean_absolute_change"] > 0
    steps = [row for row in read_metrics(result.folder / "metrics.jsonl") if row["stage"] == "unlearn"]
    assert sum(sample["updates"] for sample in told["samples"]) == steps[-1]["sampling/draws"]
    gone = [sample["forgotten_at"] for sample in told["samples"]]
    assert sum(step is not None for step in gone) == steps[-1]["sampling/forgotten"]
    assert None in gone or len(steps) == max(gone)
    assert all(sample["mrd_before"] > 0 for sample in told["samples"])
    html = (result.folder / "report.html").read_text()
    assert "updates of each sample" in html
    assert f"drawn by Memory Removal Difficulty of {scored}, with replacement" in html
    assert f"{told['mean_absolute_change']:.3g} is the mean absolute change" in html
    assert f"below extraction likelihood {told['limits']['el']:.3f}" in html
