"""The dual variable on the retain loss: how it moves, and that a stopped run goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pyunlearn.model.forward import supervised_stats
from pyunlearn.runs import ConfigError, load_config
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.dual import Dual
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted
from pyunlearn.training.trainer import UnlearnTrainer

from ..runs.test_run import press_at
from ..runs.test_written_runs import KILLED

TERMS = ["pdu", ("gd", 2.0)]


def logged(tiny, args, dual, terms=TERMS):
    """(coefficient, retain loss) of every step, and the variable at the end."""
    trainer = UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=terms, dual=dual)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    for row in steps:
        whole = row["forget.pdu/loss"] + row["retain.gd/coefficient"] * row["retain.gd/loss"]
        assert row["loss"] == pytest.approx(whole, rel=1e-5)
    return [(row["retain.gd/coefficient"], row["retain.gd/loss"]) for row in steps], dual.memory.value


@pytest.mark.parametrize("eps", [1.0, 20.0])
def test_it_moves_after_every_step_past_the_warm_up(tiny, arguments, eps):
    """4 steps an epoch, one epoch of warm-up; above the bound it grows, below it falls, never below 0."""
    args = arguments(per_device_train_batch_size=2, max_steps=10)
    steps, last = logged(tiny, args, Dual(eps, step=0.5, warmup_epochs=1))
    value, seen = 2.0, []
    for number, (used, loss) in enumerate(steps, 1):
        assert used == pytest.approx(value, rel=1e-12)
        if number > 4:
            value = max(0.0, value + 0.5 * (loss - eps))
        seen.append(value)
    assert last == pytest.approx(value, rel=1e-12)
    assert (seen[-1] > 2.0) == (eps == 1.0)
    assert eps == 1.0 or seen[-1] == 0.0


def test_it_moves_after_every_micro_batch_as_in_open_unlearning(tiny, arguments):
    """A step of 4 moves 4 times, by the mean of each micro-batch alone; each has the lam that those before it left."""
    args = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3, learning_rate=0.0)
    dual = Dual(0.3, start=100.0, step=5.0, every="micro_batch", warmup_epochs=1)
    terms = ["pdu", "gd"]
    trainer = UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=terms, dual=dual)
    losses, model = [], tiny.model()
    collate = trainer.data_collator

    def collated(items):
        batch = collate(items)
        with torch.no_grad():
            losses.append(-supervised_stats(model, batch["retain"])[0].logp.double())
        return batch

    trainer.data_collator = collated
    trainer.train()
    assert len(losses) == 12
    value, used = 100.0, []
    for step in range(3):
        parts = []
        for part in losses[4 * step : 4 * step + 4]:
            parts.append((value, part.sum()))
            if step:  # the first is the epoch of the warm-up
                value = max(0.0, value + 5.0 * (part.mean().item() - 0.3))
        used.append(float(sum(v * s for v, s in parts) / sum(s for _, s in parts)))
    assert dual.memory.value == pytest.approx(value, rel=1e-5)
    assert value > 100 + 8 * 5 * 0.3
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["retain.gd/coefficient"] for row in rows] == pytest.approx(used, rel=1e-5)
    for row in rows:
        whole = row["forget.pdu/loss"] + row["retain.gd/coefficient"] * row["retain.gd/loss"]
        assert row["loss"] == pytest.approx(whole, rel=1e-5)


def test_a_step_of_one_micro_batch_is_a_step(tiny, arguments):
    args = arguments(per_device_train_batch_size=2, max_steps=6)
    one, other = (logged(tiny, args, Dual(1.0, warmup_epochs=1, every=every)) for every in ("step", "micro_batch"))
    assert [pytest.approx(each, rel=1e-6) for each in one[0]] == other[0]
    assert one[1] == pytest.approx(other[1], rel=1e-6)


def test_it_moves_once_an_epoch(tiny, arguments):
    args = arguments(per_device_train_batch_size=2, max_steps=12)
    steps, last = logged(tiny, args, Dual(1.0, start=7.0, every="epoch", warmup_epochs=2))
    assert [used for used, _ in steps[:8]] == [7.0] * 8
    second = 7.0 + sum(loss for _, loss in steps[4:8]) / 4 - 1.0
    assert [used for used, _ in steps[8:]] == pytest.approx([second] * 4)
    assert last == pytest.approx(second + sum(loss for _, loss in steps[8:]) / 4 - 1.0)


def test_the_bound_from_the_reference(tiny, arguments):
    dual = Dual(above_reference=0.25)
    logged(tiny, arguments(), dual)
    pairs = tiny.pairs()
    with torch.no_grad():
        batch = pairs.collate([{"retain": row} for row in tiny.retain])["retain"]
        stats, _ = supervised_stats(tiny.model().eval(), batch)
    assert dual.memory.eps == pytest.approx(-1.25 * stats.logp.mean().item(), rel=1e-5)


def test_micro_batches_do_not_matter(tiny, arguments):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        args = arguments(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=4)
        found.append(logged(tiny, args, Dual(1.0)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("every", ["micro_batch", "step", "epoch"])
def test_a_run_stopped_and_resumed_ends_bit_for_bit(tiny_config, tmp_path, monkeypatch, every):
    dual = {"above_reference": 0.01, "step": 3.0, "start": 5.0, "every": every}
    unlearn = {"forget": "pdu", "retain": "gd", "dual": dual, "batch_size": 1, "epochs": 4}
    if every == "micro_batch":
        unlearn |= {"gradient_accumulation_steps": 3, "epochs": 12}
    config, whole = (tiny_config({"unlearn": unlearn, "output": str(tmp_path / name)}) for name in ("run", "whole"))
    run(whole)
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 3)
        with pytest.raises(Interrupted, match="stopped in unlearn at step 4"):
            run(config)
    run(config, resume=True)
    check_same(config.folder, whole.folder)


@pytest.mark.parametrize(("every", "step"), [("step", 3), ("epoch", 5)])
def test_a_run_killed_and_resumed_ends_bit_for_bit(tiny_config, tmp_path, every, step):
    """kill -9 after a checkpoint: the variable, its bound and where it is in an epoch are in that."""
    dual = {"above_reference": 0.01, "step": 3.0, "start": 5.0, "every": every}
    unlearn = {"forget": "pdu", "retain": "gd", "dual": dual, "batch_size": 1, "epochs": 4, "save_steps": 1}
    config, whole = (tiny_config({"unlearn": unlearn, "output": str(tmp_path / name)}) for name in ("run", "whole"))
    run(whole)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.yaml"), "unlearn", str(step)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert TrainingFolder(config.folder).last_checkpoint("unlearn").name == f"checkpoint-{step}"
    run(config, resume=True)
    check_same(config.folder, whole.folder)


def check_same(folder, whole):
    """What every step has logged, and the weights in the end."""
    ours, theirs = (
        [
            {key: value for key, value in row.items() if "per_second" not in key and "runtime" not in key}
            for row in read_metrics(one / "metrics.jsonl")
            if row["stage"] == "unlearn"
        ]
        for one in (folder, whole)
    )
    assert ours == theirs
    assert len({row["retain.gd/coefficient"] for row in ours}) > 1
    assert len({row["dual/eps"] for row in ours}) == 1
    weights = [load_file(one / "checkpoint" / "model.safetensors") for one in (folder, whole)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_settings():
    config = UnlearnConfig(forget="pdu", retain="gd", dual="open_unlearning_tofu")
    told = {
        "eps": 0.3,
        "above_reference": None,
        "start": 100.0,
        "step": 5.0,
        "every": "micro_batch",
        "warmup_epochs": 5.0,
    }
    assert config.dual.arguments() == told
    given = UnlearnConfig(retain="gd", dual={"preset": "open_unlearning_muse_news", "above_reference": 0.1})
    assert (given.dual.eps, given.dual.above_reference, given.dual.start) == (None, 0.1, 50.0)
    assert UnlearnConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert UnlearnConfig(recipe="pdu").dual.start == 100.0
    assert UnlearnConfig(recipe="pdu", dual={"eps": 1.0}).dual.eps == 1.0
    assert UnlearnConfig(recipe="pdu", dual=None).dual is None
    assert UnlearnConfig(retain={"name": "gd", "coefficient": 3}, dual={"eps": 1}).dual.start is None  # 3, then
    term = UnlearnConfig(forget={"name": "npo", "temperature": 2, "keep": 0.8, "kept": "largest"}).forget[0].objective()
    assert (term.temperature, term.keep, term.kept) == (2.0, 0.8, "largest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual": {}}, r"eps=None, above_reference=None: needs one of them"),
        ({"dual": {"eps": 1, "above_reference": 0.1}}, r"eps=1\.0, above_reference=0\.1: needs one of them"),
        ({"dual": "open_unlearning_tofo"}, "did you mean open_unlearning_tofu"),
        ({"dual": {"eps": 1}, "retain": []}, r"one retain objective, got \[\]; needs rows to retain \(data\.retain\)"),
        ({"dual": "open_unlearning_tofu", "retain": {"name": "gd", "coefficient": 3}},
         r"dual\.start=100 takes the place of retain\.0\.coefficient=3: leave the coefficient out, or set dual\.start"),
        ({"forget": {"name": "ga", "temperature": 2, "options": {"temperature": 2}}},
         "ga: temperature is given beside options and in them"),
        ({"forget": {"name": "rmu", "temperature": 2}}, "rmu: temperature=2 divides logits, and rmu is of hidden"),
        ({"dual": {"eps": 1, "step": -1}}, "greater than or equal to 0"),
        ({"dual": {"eps": 1, "evry": "step"}}, "evry"),
        ({"forget": {"name": "ga", "keep": 1.5}}, r"ga: keep=1\.5: needs a number above 0, up to 1"),
        ({"forget": {"name": "ga", "temperature": -1}}, r"ga: temperature=-1\.0: needs a finite number > 0"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**{"retain": "gd", **settings})


def test_bad_input_is_named(tiny, arguments, tmp_path):
    with pytest.raises(ConfigError, match="dual"):
        load_config(None, ["unlearn.dual.epsilon=1"])
    with pytest.raises(TypeError, match="needs one of them"):
        Dual()
    with pytest.raises(ValueError, match=r"step=-1\.0: needs a finite number >= 0"):
        Dual(1.0, step=-1.0)
    with pytest.raises(ValueError, match="every='steps': did you mean step"):
        Dual(1.0, every="steps")
    with pytest.raises(ValueError, match=r"dual: needs one retain objective, got \[\]"):
        logged(tiny, arguments(), Dual(1.0), ["pdu"])
    with pytest.raises(ValueError, match="dual: above_reference measures the retain loss on the retain rows"):
        UnlearnTrainer(
            model=tiny.model(), args=arguments(), train_dataset=tiny.pairs(refuse=("retain",)),
            objectives=["pdu", "ap"], dual=Dual(above_reference=0.1),
        ).train()  # fmt: skip
    args = arguments(max_steps=2, save_strategy="steps", save_steps=1)
    UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=TERMS).train()
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=TERMS, dual=Dual(1.0)
    )
    with pytest.raises(ValueError, match="the checkpoint has no dual variable"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
