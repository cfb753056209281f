"""Every argument of transformers' Trainer: with it gradient ascent turned round is its training, or it is refused.

Also the objectives in transformers' Trainer itself.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

import pyunlearn as pu
from pyunlearn.data import ForgetRetainDataset, collate
from pyunlearn.training.arguments import OPTIONS_REFUSED, REFUSED
from pyunlearn.training.trainer import UnlearnTrainer

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
COSINE = {"lr_scheduler_type": "cosine_with_restarts", "num_train_epochs": 3}
EQUAL = [
    {"per_device_train_batch_size": 2},
    {"gradient_accumulation_steps": 2},
    {"num_train_epochs": 2.5},
    {"max_steps": 4},
    {"learning_rate": 0.01},
    {"lr_scheduler_type": "linear"},
    COSINE,
    {**COSINE, "lr_scheduler_kwargs": {"num_cycles": 2}},
    {"lr_scheduler_type": "linear", "warmup_steps": 2},
    {"weight_decay": 0.5},
    {"max_grad_norm": 0.5},
    ADAM,
    {**ADAM, "adam_beta1": 0.5},
    {**ADAM, "adam_beta2": 0.5},
    {**ADAM, "adam_epsilon": 1e-2},
    {"optim": "adafactor", "optim_args": "decay_rate=-0.5"},
    {"seed": 7},
    {"data_seed": 7},
    {"dataloader_drop_last": True},
    {"train_sampling_strategy": "sequential"},
    {"neftune_noise_alpha": 5.0},
    {"bf16": True},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    {"auto_find_batch_size": True},
    {"torch_empty_cache_steps": 1},
    {"include_num_input_tokens_seen": "non_padding"},
]
SAME_NUMBERS = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "auto_find_batch_size", "torch_empty_cache_steps",
    "include_num_input_tokens_seen",
}  # fmt: skip
WRONG = {
    "label_smoothing_factor": 0.1, "average_tokens_across_devices": False, "use_cache": True, "torch_compile": True,
    "use_liger_kernel": True, "bf16_full_eval": True, "fp16_full_eval": True, "label_names": ["labels"],
}  # fmt: skip
# Of logs, files, evaluations, devices and loaders: UnlearnTrainer touches nothing of what they do.
AROUND = r"""(logging|log|eval|save|hub|dataloader|ddp|trackio)_\w+|output_dir|disable_tqdm|report_to|run_name|project
|per_device_eval_batch_size|load_best_model_at_end|metric_for_best_model|greater_is_better|ignore_data_skip|use_cpu
|restore_callback_states_from_checkpoint|full_determinism|accelerator_config|parallelism_config|fsdp|fsdp_config
|deepspeed|debug|skip_memory_metrics|do_\w+|resume_from_checkpoint|local_rank|push_to_hub|enable_jit_checkpoint|tf32
|optim_target_modules|fp16|length_column_name"""
OTHER_NAMES = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # of activation_checkpointing
WITH_COMPUTE_METRICS = {"prediction_loss_only", "include_for_metrics", "batch_eval_metrics"}  # which is refused
WITH_REFUSED = {"torch_compile_backend", "torch_compile_mode", "liger_kernel_config"}
SET_HERE = {"remove_unused_columns"}


def without_index(rows):
    batch = collate(rows, 0)
    del batch["index"]
    return batch


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def settings(changes):
    return {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, **changes}


@pytest.fixture
def ours(tiny, arguments):
    def train(changes, **options):
        pairs = ForgetRetainDataset(tiny.forget)
        args = arguments(**settings(changes))
        trainer = UnlearnTrainer(
            model=tiny.model(), args=args, train_dataset=pairs, objectives=[("ga", -1.0)], **options
        )
        trainer.train()
        return trainer

    return train


@pytest.fixture
def theirs(tiny, arguments):
    def train(changes, **options):
        args = arguments(**settings(changes))
        args.remove_unused_columns = False
        rows = [tiny.forget[i] for i in range(len(tiny.forget))]
        trainer = Trainer(tiny.model(), args, train_dataset=rows, data_collator=without_index, **options)
        trainer.train()
        return trainer

    return train


@pytest.fixture(scope="module")
def plain(tiny):
    """The weights after a training with no argument changed."""
    kept = []
    return lambda train: kept[0] if kept else kept.append(parameters(train({}).model)) or kept[0]


@pytest.mark.parametrize("changes", EQUAL, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()))
def test_gradient_ascent_turned_round_is_transformers_own_training(ours, theirs, plain, changes):
    mine, stock = ours(changes), theirs(changes)
    loose = 1e-2 if "bf16" in changes else 1e-4
    logs = [[row for row in trainer.state.log_history if "loss" in row] for trainer in (mine, stock)]
    assert len(logs[0]) == len(logs[1]) > 1
    for ours_row, row in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert ours_row[key] == pytest.approx(row[key], rel=loose, abs=1e-8), key
    assert mine.state.total_flos == stock.state.total_flos > 0
    assert mine.state.num_input_tokens_seen == stock.state.num_input_tokens_seen
    after = parameters(mine.model)
    scale = (after - plain(ours)).abs().max() if not changes.keys() <= SAME_NUMBERS else 0.01
    assert scale > 1e-5, "no effect"
    torch.testing.assert_close(after, parameters(stock.model), rtol=0, atol=1e-2 if "bf16" in changes else 2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused(tiny, arguments, name):
    args = arguments()
    setattr(args, name, WRONG[name])
    value, reason = re.escape(repr(WRONG[name])), REFUSED[name][:8]
    with pytest.raises(ValueError, match=rf"^args\.{name}={value}: needs .*: {reason}"):
        UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=["ga"])


@pytest.mark.parametrize("name", OPTIONS_REFUSED)
def test_an_option_without_effect_is_refused(ours, name):
    with pytest.raises(ValueError, match=f"^{name}: needs None: "):
        ours({}, **{name: lambda *args: None})


def test_hooks_that_would_stay_are_refused(ours):
    with pytest.raises(ValueError, match=r"args\.debug='underflow_overflow': needs '': its hooks .* stay on the model"):
        ours({"debug": "underflow_overflow"})


def test_batches_by_length_are_refused(ours):
    with pytest.raises(ValueError, match="lengths"):
        ours({"train_sampling_strategy": "group_by_length"})


def test_every_argument_is_known():
    """One that is in no list here is new in transformers: say what it does, or refuse it."""
    known = {*REFUSED, *OTHER_NAMES, *WITH_COMPUTE_METRICS, *WITH_REFUSED, *SET_HERE}
    known.update(*(changes.keys() for changes in EQUAL))
    around = re.compile(AROUND.replace("\n", ""))
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert [name for name in names if name not in known and not around.fullmatch(name)] == []


def test_a_loss_of_ones_own_in_transformers_trainer_knows_no_split(theirs):
    """1 x 4 and 4 x 1 end the same, with unequal lengths, where the count is the step's."""

    def loss(outputs, labels, num_items_in_batch=None):
        stats = pu.token_stats(outputs.logits[:, :-1], labels[:, 1:])
        return pu.objectives.wga(stats.logp, stats.mask, count=num_items_in_batch)

    whole = theirs({"per_device_train_batch_size": 4, "max_steps": 2}, compute_loss_func=loss)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    parts = theirs(split, compute_loss_func=loss)
    torch.testing.assert_close(parameters(parts.model), parameters(whole.model), rtol=0, atol=1e-6)
    for ours_row, row in zip(parts.state.log_history[:2], whole.state.log_history[:2], strict=True):
        assert ours_row["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert ours_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
