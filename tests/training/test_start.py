"""The weights before the first step: on disk meanwhile, not in memory, and those of the start after a kill too."""

from __future__ import annotations

import copy
import errno
import gc
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from pyunlearn import _files, store
from pyunlearn.data.tiny import tiny_llama
from pyunlearn.model.lora import add_adapter
from pyunlearn.training import start as start_module
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.selection import selected, trainable
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.start import Start, started
from pyunlearn.training.unlearn import UnlearnData, unlearn

from ..resident import Peak, resident
from ..runs.test_run import press_at
from ..tiny import SIZES

PLAIN: dict[str, Any] = {"forget": "ga", "retain": [], "learning_rate": 1e-2, "batch_size": 4, "max_steps": 4}
SETTINGS = UnlearnConfig(**PLAIN, save_steps=1, scheduler="constant")


@pytest.fixture
def data(tiny):
    return UnlearnData(tiny.world.forget, tiny.world.retain, [])


@pytest.fixture
def stage(tmp_path):
    return Stage(TrainingFolder(tmp_path / "work"))


def change_between(before, after) -> float:
    """From two models in memory, as the number is defined."""
    total = count = 0.0
    for (name, old), (other, new) in zip(trainable(before), trainable(after), strict=True):
        assert name == other
        total += float((new.detach().float() - old.detach().float()).abs().sum(dtype=torch.float64))
        count += new.numel()
    return total / count


def deep(tiny) -> tuple[Any, int, int]:
    """A model of many tensors, its bytes, and those of its largest one."""
    model = tiny_llama(tiny.tokenizer, **{**SIZES, "intermediate_size": 512, "num_hidden_layers": 16})
    sizes = [weight.nbytes for _, weight in trainable(model)]
    assert sum(sizes) > 30 * max(sizes)
    return model, sum(sizes), max(sizes)


class Held(TrainerCallback):
    """The most bytes of tensors after a step beside the model, its gradients, and what was there before it was made.

    copies: holds a copy of the model's weights meanwhile, in the place of what must not be.
    """

    def __init__(self, copies: bool):
        gc.collect()
        self.copies, self.before, self.bytes = copies, sum(resident().values()), 0
        self.kept: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.copies:
            self.kept = [weight.detach().to("cpu", copy=True) for _, weight in trainable(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        known = {each.data_ptr() for w in model.parameters() for each in (w, w.grad) if each is not None}
        now = resident()
        self.bytes = max(self.bytes, sum(now.values()) - sum(now[place] for place in known) - self.before)


def held_by_a_training(tiny, data, stage, copies: bool) -> tuple[int, int, int]:
    """(most bytes beside the model and its gradients, bytes of the model, bytes of its largest weight)"""
    held = Held(copies)
    model, whole, largest = deep(tiny)
    settings = UnlearnConfig(**{**PLAIN, "max_steps": 2}, optim="sgd")
    assert unlearn(stage, settings, model, tiny.tokenizer, data, watching=[held]).mean_absolute_change > 0
    return held.bytes, whole, largest


def test_no_second_model_is_held_while_it_trains(tiny, data, stage):
    held, whole, largest = held_by_a_training(tiny, data, stage, copies=False)
    assert held < largest < whole / 30
    held, whole, _ = held_by_a_training(tiny, data, stage, copies=True)  # what it must not be is seen
    assert held >= whole


def test_they_are_read_a_tensor_at_a_time(tiny, stage):
    model, whole, largest = deep(tiny)
    before = copy.deepcopy(model)
    start = Start(stage, "unlearn")
    with Peak() as writing:
        start.keep(model)
        model.lm_head.weight.detach().add_(0)  # so that it looks once at least
        model.lm_head.weight.detach().copy_(before.lm_head.weight.detach())
    assert writing.bytes <= largest
    with torch.no_grad():
        for _, weight in trainable(model):
            weight.mul_(1.1)
    model.bfloat16()  # so that it copies
    with Peak() as reading:
        assert start.mean_absolute_change(model) > 0
    assert largest <= reading.bytes <= 5 * largest
    with Peak() as loaded:
        every = [start_module.Tensors(start.path).read([name]).clone() for name, _ in trainable(model)]
        model.float()
    assert loaded.bytes >= whole
    assert len(every) > 100


@pytest.mark.parametrize(
    ("dtype", "adapter", "options"),
    [
        (torch.float32, False, {}),
        (torch.bfloat16, False, {}),
        (torch.float32, False, {"train_only": [r".*mlp.*"]}),
        (torch.float32, True, {}),
    ],
    ids=["float32", "bfloat16", "train_only", "lora"],
)
def test_the_number_is_that_of_two_models_in_memory(tiny, data, stage, dtype, adapter, options):
    model = tiny.model().to(dtype)
    if adapter:
        model = add_adapter(model, r=2, seed=1, base="base")
    before = copy.deepcopy(model)
    settings = SETTINGS.model_copy(update={**options, "save_steps": 50})
    told = unlearn(stage, settings, model, tiny.tokenizer, data)
    with selected(model, settings), selected(before, settings):
        assert told.mean_absolute_change == change_between(before, model) > 0
    assert not stage.folder.start("unlearn").exists()


def test_it_is_over_trained_weights(tiny, stage):
    model = tiny.model()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    start = Start(stage, "unlearn")
    start.keep(model)
    with torch.no_grad():
        frozen.add_(100.0)
        expected, count = 0.0, 0
        for i, (_, weight) in enumerate(trainable(model)):
            weight.add_(0.01 * (-1) ** i * (i + 1))
            expected, count = expected + 0.01 * (i + 1) * weight.numel(), count + weight.numel()
    assert start.mean_absolute_change(model) == pytest.approx(expected / count, rel=1e-4)


def interrupted(monkeypatch, train) -> None:
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 2)
        with pytest.raises(Interrupted, match="at step 3 of 4"):
            train()


def test_stopped_and_resumed_the_number_is_of_the_start(tiny, data, stage, tmp_path, monkeypatch):
    """Found where it was left, also where the model is no more that of the start, and made again where it is not."""
    whole, before = tiny.model(), tiny.model()
    uninterrupted = unlearn(Stage(TrainingFolder(tmp_path / "whole")), SETTINGS, whole, tiny.tokenizer, data)
    place = stage.folder.start("unlearn")
    for case in ("found", "another model", "none", "half gone"):
        stopped = tiny.model()
        interrupted(monkeypatch, lambda model=stopped: unlearn(stage, SETTINGS, model, tiny.tokenizer, data))
        assert sorted(path.name for path in place.iterdir()) == ["00000.safetensors", "digests.json"]
        assert change_between(before, stopped) > 0
        if case == "none":
            Start(stage, "unlearn").remove()
            assert not place.exists()
        elif case == "half gone":  # a kill while it is removed
            with monkeypatch.context() as patch:
                patch.setattr(start_module.shutil, "rmtree", lambda *args, **kwargs: None)
                Start(stage, "unlearn").remove()
            (place / "00000.safetensors").write_bytes(b"")
        model = stopped if case == "another model" else tiny.model()
        told = unlearn(stage, SETTINGS, model, tiny.tokenizer, data)
        assert told.mean_absolute_change == change_between(before, model), case
        assert told.mean_absolute_change == uninterrupted.mean_absolute_change, case
        assert not place.exists()
        stage.folder.remove_training("unlearn")


def test_a_stage_that_begins_anew_writes_its_own(tiny, data, stage, monkeypatch):
    """What a kill has left before the first checkpoint is of no training; neither is what it has left half written."""
    other = tiny.model(seed=1)
    Start(stage, "unlearn").keep(other)
    place = stage.folder.start("unlearn")
    temporary = place.with_name(".start.tmp")
    temporary.mkdir()
    (temporary / "00000.safetensors").write_bytes(b"half")
    model, before = tiny.model(), tiny.model()
    told = unlearn(stage, SETTINGS, model, tiny.tokenizer, data)
    assert told.mean_absolute_change == change_between(before, model)
    assert not temporary.exists()


def fails(stage) -> None:
    assert stage.folder.start("unlearn").is_dir()
    raise RuntimeError("a bug")


def test_what_fails_before_a_checkpoint_leaves_nothing_and_after_it_the_start(tiny, stage):
    model = tiny.model()
    for resumed in (False, True):
        if resumed:
            checkpoint = stage.folder.training("unlearn") / "checkpoint-1"
            checkpoint.mkdir()
            _files.seal(checkpoint)
        with pytest.raises(RuntimeError, match="a bug"), started(stage, "unlearn", model):
            fails(stage)
        assert stage.folder.start("unlearn").exists() == resumed


def test_what_is_not_the_start_of_this_stage_is_told(tiny, data, stage, monkeypatch):
    interrupted(monkeypatch, lambda: unlearn(stage, SETTINGS, tiny.model(), tiny.tokenizer, data))
    place = stage.folder.start("unlearn")
    fewer = SETTINGS.model_copy(update={"freeze": ["model.embed_tokens.weight"]})
    with pytest.raises(ValueError, match=r"^model.embed_tokens.weight: is trained no more, .*/start began; needs"):
        unlearn(stage, fewer, tiny.model(), tiny.tokenizer, data)
    content = bytearray((place / "00000.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "00000.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"00000.safetensors: is damaged, .*; delete .*/start: it is made again"):
        unlearn(stage, SETTINGS, tiny.model(), tiny.tokenizer, data)
    assert stage.folder.last_checkpoint("unlearn") is not None


def test_where_it_cannot_be_written(tiny, data, stage, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written \(.*No space left.*\): '.*training/unlearn/start'") as caught:
        unlearn(stage, SETTINGS, tiny.model(), tiny.tokenizer, data)
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    assert not any(stage.folder.training("unlearn").iterdir())
