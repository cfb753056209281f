"""A model after a training or an evaluation of it: other weights, and no other trace."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback

from pyunlearn.data import collate
from pyunlearn.metrics import teacher_forced
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.training.as_found import SWITCHES, left_as_found
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.settings import MemoriseConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.trainer import UnlearnTrainer
from pyunlearn.training.unlearn import UnlearnData, memorise, unlearn

NO_STEP = {"learning_rate": 0.0}  # the loss of the weights as they are


def trainer_of(tiny, args, model, objectives=("ga", "gd"), **options):
    return UnlearnTrainer(model=model, args=args, train_dataset=tiny.pairs(), objectives=objectives, **options)


def without_index(rows):
    batch = collate(rows, 0)
    del batch["index"]
    return batch


def first_loss(tiny, args, model):
    trainer = trainer_of(tiny, args, model)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def traces(model):
    """All of a model but its tensors: what its modules hold themselves, and its configuration."""
    own = {}
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        own[name] = {key: dict(value) if isinstance(value, dict) else value for key, value in kept.items()}
    grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return own, copy.deepcopy(vars(model.config)), grads, trained


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_optimizer_step(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("error", [None, ArithmeticError("stop"), KeyboardInterrupt()], ids=["end", "error", "ctrl-c"])
def test_a_training_leaves_the_weights_alone_changed(tiny, arguments, adapted, error):
    model = tiny.model()
    model.config.use_cache = True
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.train()
    model.get_submodule("base_model.model.lm_head" if adapted else "lm_head").eval()
    before = traces(model)
    args = arguments(bf16=True, neftune_noise_alpha=5.0, activation_checkpointing=True, max_steps=2)
    given = dict(vars(args))
    trainer = trainer_of(tiny, args, model, callbacks=[] if error is None else [Stop(error)])
    if error is None:
        trainer.train()
    else:
        with pytest.raises(type(error)):
            trainer.train()
    assert traces(model) == before
    assert vars(args) == given
    trainer.evaluate(tiny.pairs())
    assert traces(model) == before


def test_each_trainer_obeys_its_own_precision(tiny, arguments):
    """bf16 and float32, one after the other on one model, are those of fresh models; so is transformers' own before."""
    half, full = (first_loss(tiny, arguments(bf16=bf16, **NO_STEP), tiny.model()) for bf16 in (True, False))
    assert half != full
    for order in ((True, False), (False, True), (True, True, False)):
        model = tiny.model()
        for bf16 in order:
            assert first_loss(tiny, arguments(bf16=bf16, **NO_STEP), model) == (half if bf16 else full)
            CausalLM.of(model).check_head()
        twice = trainer_of(tiny, arguments(bf16=True, **NO_STEP), model)
        for _ in range(2):
            twice.train()
            assert twice.state.log_history[0]["loss"] == half
    rows = [tiny.forget[i] for i in range(len(tiny.forget))]
    for bf16 in (True, False):
        model = tiny.model()
        args = arguments(bf16=bf16, **NO_STEP)
        args.remove_unused_columns = False
        Trainer(model, args, train_dataset=rows, data_collator=without_index).train()
        theirs = {key: vars(model)[key] for key in ("forward", "_original_forward") if key in vars(model)}
        assert first_loss(tiny, arguments(bf16=not bf16, **NO_STEP), model) == (full if bf16 else half)
        assert {key: vars(model)[key] for key in ("forward", "_original_forward") if key in vars(model)} == theirs


def test_an_evaluation_is_as_asked_before_and_after_a_training(tiny, arguments):
    found = {}
    for bf16 in (True, False):
        trainer = trainer_of(tiny, arguments(bf16=bf16, **NO_STEP), tiny.model())
        losses = [trainer.evaluate(tiny.pairs())["eval_loss"]]
        trainer.train()
        losses.append(trainer.evaluate(tiny.pairs())["eval_loss"])
        assert losses[0] == losses[1]
        found[bf16] = losses[0]
    assert found[True] != found[False]


@pytest.mark.parametrize("memorising", [True, False])
@pytest.mark.parametrize("unlearning", [True, False])
def test_stages_obey_their_own_precision(tiny, tmp_path, memorising, unlearning):
    """After any stages, float32 metrics of the model are those of a fresh model with its weights."""
    data, stage = UnlearnData(tiny.world.forget, tiny.world.retain, []), Stage(TrainingFolder(tmp_path))
    common = {"batch_size": 4, "learning_rate": 1e-3, "max_steps": 2}
    model = tiny.model()
    memorise(stage, MemoriseConfig(bf16=memorising, gradient_checkpointing=True, **common), model, tiny.tokenizer, data)
    again = tiny.model()
    again.load_state_dict(model.state_dict())
    assert not model.is_gradient_checkpointing
    settings = UnlearnConfig(forget="npo", retain="kl", bf16=unlearning, **common)
    unlearn(stage, settings, model, tiny.tokenizer, data)
    fresh = Stage(TrainingFolder(tmp_path / "fresh"))
    unlearn(fresh, settings, again, tiny.tokenizer, data)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert teacher_forced(model, tiny.forget, progress=False) == teacher_forced(again, tiny.forget, progress=False)


def test_a_failed_training_leaves_nothing_to_the_next(tiny, arguments):
    """Terms of the micro-batches before the error do not go into the next training's logs."""

    class StopOnce(TrainerCallback):
        stopped = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.stopped:
                self.stopped = True
                raise ArithmeticError("stop")

    args = arguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, **NO_STEP)
    trainer = trainer_of(tiny, args, tiny.model(), callbacks=[StopOnce()])
    with pytest.raises(ArithmeticError, match="stop"):
        trainer.train()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["forget.ga/loss"] + log["retain.gd/loss"])


def test_what_was_set_before_stays_set(tiny):
    model = tiny.model()
    model.gradient_checkpointing_enable()
    before = traces(model)
    with left_as_found(model):
        model.enable_input_require_grads()
        model.train()
    assert traces(model) == before
    assert {"training", "gradient_checkpointing"} <= set(SWITCHES)
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks


def test_half_precision_that_a_cpu_does_not_have_is_refused(tiny, arguments):
    with pytest.raises(ValueError, match=r"args\.fp16=True: needs a GPU"):
        trainer_of(tiny, arguments(fp16=True), tiny.model())


def test_arguments_and_a_model_made_by_the_trainer_serve_again(tiny, arguments):
    """`args` of one trainer make the next; with `model_init` every training starts anew, on the trainer's model."""
    first = trainer_of(tiny, arguments(max_steps=1), None, model_init=lambda: tiny.model())
    losses = []
    for trainer in (first, first, trainer_of(tiny, first.args, tiny.model())):
        losses.append(trainer.train().training_loss)
        assert trainer.model_wrapped is trainer.model
        assert trainer.evaluate(tiny.pairs())["eval_loss"] != losses[0]
    assert losses[0] == losses[1] == losses[2]


def test_hooks_of_callers_stay_whatever_they_are(tiny, arguments):
    class Hook:
        def __call__(self, *_):
            return None

    class Registers(TrainerCallback):
        def on_train_begin(self, *_, model, **options):
            model.get_input_embeddings().register_forward_hook(Hook())

    model = tiny.model()
    trainer_of(tiny, arguments(max_steps=1), model, callbacks=[Registers()]).train()
    (hook,) = model.get_input_embeddings()._forward_hooks.values()
    assert isinstance(hook, Hook)
