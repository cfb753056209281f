"""What the training sections take beside rates and steps: warm-up, optimizers, transformers' other arguments."""

from __future__ import annotations

import re

import pytest
import torch
from pydantic import ValidationError

from pyunlearn import objectives
from pyunlearn.data import ForgetRetainDataset
from pyunlearn.model.forward import supervised_stats
from pyunlearn.training import arguments as arguments_module
from pyunlearn.training.arguments import check_library, check_values
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.settings import OPTIMIZER, MemoriseConfig
from pyunlearn.training.stage import Stage, planned_steps, training_arguments
from pyunlearn.training.terms import TermLosses
from pyunlearn.training.trainer import UnlearnTrainer
from pyunlearn.training.unlearn import UnlearnData, unlearn

STEPS = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 2, "scheduler": "constant", "retain": "gd"}


@pytest.fixture
def stage(tmp_path):
    return Stage(TrainingFolder(tmp_path / "work"))


@pytest.fixture
def data(tiny):
    return UnlearnData(tiny.world.forget, tiny.world.retain, list(tiny.world.refusals))


def rates(stage, settings, tiny, data):
    unlearn(stage, settings, tiny.model(), tiny.tokenizer, data)
    return [row["learning_rate"] for row in read_metrics(stage.folder.metrics)]


# ---- warm-up ---------------------------------------------------------------------------------------------------------


def test_an_epoch_of_warm_up(tiny, data, stage):
    """8 rows by 3: two whole steps of an epoch of three, after which the rate is reached."""
    settings = UnlearnConfig(**{**STEPS, "batch_size": 3, "max_steps": None}, epochs=2, warmup="epoch")
    assert training_arguments(stage, "unlearn", settings, 8).warmup_steps == 2
    constant = settings.model_copy(update={"scheduler": "constant_with_warmup"})
    assert rates(stage, constant, tiny, data) == pytest.approx([0, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2])


@pytest.mark.parametrize(
    ("rows", "batch_size", "accumulation", "epochs", "max_steps", "steps"),
    [(8, 3, 1, 2, None, 6), (8, 3, 2, 2, None, 4), (8, 3, 2, 0.5, None, 1), (9, 8, 4, 3, None, 3), (8, 1, 1, 1, 5, 5)],
)
def test_steps_are_planned_as_transformers_takes_them(
    tiny, data, stage, rows, batch_size, accumulation, epochs, max_steps, steps
):
    own = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "epochs": epochs}
    settings = UnlearnConfig(**own, max_steps=max_steps, retain=[], forget="ga")
    assert planned_steps(stage, settings, rows) == steps
    if rows == 8:
        assert unlearn(stage, settings, tiny.model(), tiny.tokenizer, data).steps == steps


@pytest.mark.parametrize(
    ("own", "rows", "message"),
    [
        ({"warmup": 0.1, "epochs": 1}, 2, r"^unlearn\.warmup=0\.1: takes 1 optimiser steps and the training has 1: it "
         r"would end with a learning rate of 0; set unlearn\.warmup=0"),
        ({"warmup": 10, "epochs": 3}, 4, "takes 10 optimiser steps and the training has 6: it would end below"),
        ({"warmup": "epoch", "epochs": 1}, 8, "warmup=epoch: takes 4 optimiser steps and the training has 4"),
    ],
)  # fmt: skip
def test_a_warm_up_that_takes_all_steps(stage, own, rows, message):
    settings = UnlearnConfig(batch_size=2, **own)
    with pytest.raises(ValueError, match=message):
        training_arguments(stage, "unlearn", settings, rows)
    training_arguments(stage, "unlearn", settings.model_copy(update={"scheduler": "constant"}), rows)  # has none
    training_arguments(stage, "unlearn", settings.model_copy(update={"epochs": 20}), rows)


@pytest.mark.parametrize(("warmup", "told"), [("step", "'step'"), (-1, "-1"), (True, "a number, got"), (None, "None")])
def test_a_warm_up_that_is_none(warmup, told):
    with pytest.raises(ValidationError, match=told):
        UnlearnConfig(warmup=warmup)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_optimizers_by_name(tiny, data, stage, monkeypatch):
    made, original = [], UnlearnTrainer.create_optimizer

    def create_optimizer(self, *args, **options):
        made.append(type(original(self, *args, **options)).__name__)
        return self.optimizer

    monkeypatch.setattr(UnlearnTrainer, "create_optimizer", create_optimizer)
    for i, name in enumerate(("sgd", "adafactor", "rmsprop", OPTIMIZER)):
        own = Stage(TrainingFolder(stage.folder.path / str(i)))
        unlearn(own, UnlearnConfig(**STEPS, optim=name), tiny.model(), tiny.tokenizer, data)
    assert [name.removeprefix("Accelerated") for name in made] == ["SGD", "Adafactor", "RMSprop", "AdamW"]


def test_an_unknown_optimizer_has_near_names():
    with pytest.raises(ValidationError, match=r"optim='adamw_torh': did you mean adamw_torch"):
        UnlearnConfig(optim="adamw_torh")
    with pytest.raises(ValidationError, match=r"optim='paged_adam': did you mean paged_adamw_"):
        MemoriseConfig(optim="paged_adam")


@pytest.mark.parametrize(
    ("name", "package"),
    [("paged_adamw_32bit", "bitsandbytes"), ("lion_8bit", "bitsandbytes"), ("galore_adamw_8bit", "galore-torch"),
     ("adamw_torch_8bit", "torchao"), ("adalomo", "lomo-optim"), ("schedule_free_sgd", "schedulefree")],
)  # fmt: skip
def test_a_missing_library_is_told_before_the_training(stage, monkeypatch, name, package):
    monkeypatch.setattr(arguments_module, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"unlearn\.optim={name}: needs {package}, .*: pip install {package}"):
        training_arguments(stage, "unlearn", UnlearnConfig(optim=name), 8)
    for own in ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"):
        check_library(own)


# ---- transformers' others --------------------------------------------------------------------------------------------


def test_other_arguments_arrive(stage):
    settings = UnlearnConfig(arguments={"adam_beta2": 0.9, "adam_epsilon": 1e-6, "lr_scheduler_kwargs": {"x": 1}})
    args = training_arguments(stage, "unlearn", settings, 8)
    assert (args.adam_beta2, args.adam_epsilon, args.lr_scheduler_kwargs) == (0.9, 1e-6, {"x": 1})
    assert training_arguments(stage, "unlearn", UnlearnConfig(), 8).adam_beta2 == 0.999


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rate", "learning_rate is unlearn.learning_rate"),
        ("per_device_train_batch_size", "per_device_train_batch_size is unlearn.batch_size"),
        ("num_train_epochs", "num_train_epochs is unlearn.epochs"),
        ("warmup_steps", "warmup_steps is unlearn.warmup"),
        ("optim", "optim is unlearn.optim"),
        ("adam_beta3", "'adam_beta3': is none of transformers' TrainingArguments; did you mean adam_beta"),
        ("remove_unused_columns", "remove_unused_columns: is not taken: a step's rows are those of the objectives"),
        ("output_dir", "output_dir: is not taken: a run writes into its own folder alone"),
        ("save_total_limit", "save_total_limit: is not taken: a run goes on from its own checkpoints"),
        ("eval_steps", "eval_steps: is not taken: what is evaluated is told by the evaluate section"),
        ("seed", "seed: is not taken: it is the run's seed"),
        ("label_smoothing_factor", "label_smoothing_factor: is not taken: an objective's targets are not smoothed"),
    ],
)
def test_arguments_that_are_not_taken(key, message):
    with pytest.raises(ValidationError) as caught:
        UnlearnConfig(arguments={key: 1})
    assert message in str(caught.value)
    if key == "learning_rate":
        with pytest.raises(ValidationError, match=r"learning_rate is memorise\.learning_rate"):
            MemoriseConfig(arguments={key: 1})


# ---- refusals, precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "pairs", "advice"),
    [
        (["idk", "gd"], {}, r"\['forget_refusal'\].*Dataset\(forget, refusals=\[texts\], refuse=\['forget'\]\)$"),
        (["ga", "gd"], {"retain": None}, r"\['retain'\].* by ForgetRetainDataset\(forget, a retain QADataset\)$"),
    ],
)
def test_objectives_without_their_rows_are_told_what_to_give(tiny, arguments, names, pairs, advice):
    dataset = ForgetRetainDataset(**{"forget": tiny.forget, "retain": tiny.retain, **pairs})
    with pytest.raises(ValueError, match=f"the objectives need {advice}"):
        UnlearnTrainer(model=tiny.model(), args=arguments(), train_dataset=dataset, objectives=names)


def test_statistics_and_losses_of_bfloat16_weights_are_float32(tiny, data, stage):
    """Every per-token number and every term of the loss; and a run's steps come out near those of float32."""
    model, pairs = tiny.model().bfloat16(), tiny.pairs(refuse=["forget", "retain"], **tiny.written)
    batch = pairs.collate([pairs[i] for i in range(4)])
    outputs = ("logp", "entropy")
    stats, _ = supervised_stats(model, batch["forget"], outputs)
    assert {getattr(stats, name).dtype for name in outputs} == {torch.float32}
    losses = TermLosses(objectives.names(), tiny.model(seed=1).bfloat16())
    values = losses.term_losses(model, batch, {term.count: 7 for term in losses.terms})
    assert {value.dtype for value in values} == {torch.float32}
    sums = []
    for dtype in (torch.float32, torch.bfloat16):
        own = Stage(TrainingFolder(stage.folder.path / str(dtype)))
        unlearn(own, UnlearnConfig(**STEPS), tiny.model().to(dtype), tiny.tokenizer, data)
        sums.append([row["loss"] for row in read_metrics(own.folder.metrics)])
    assert sums[1] == pytest.approx(sums[0], rel=0.05)
    assert sums[1] != sums[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adam_beta2": "abc"}, "adam_beta2 needs a number, got 'abc'"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "foo"),
        ({"deepspeed": "nope.json"}, "deepspeed"),
    ],
)
def test_values_of_arguments_are_checked_before_anything(arguments, message):
    settings = UnlearnConfig(forget="ga", retain=[], scheduler="cosine", arguments=arguments)
    with pytest.raises(ValueError, match=r"^unlearn\.arguments=.*" + re.escape(message)):
        check_values(settings, "unlearn.arguments")
    check_values(UnlearnConfig(forget="ga", retain=[], arguments={"adam_beta2": 0.9}), "unlearn.arguments")
