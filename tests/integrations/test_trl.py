"""TRL's own trainers, with its kernel and with ours in its place: the same losses, metrics and weights."""

import contextlib
import copy
import math
import sys

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import utils

from pyunlearn.integrations import trl as ours
from pyunlearn.integrations.trl import accelerate_trl, token_numbers

from ..tiny import tiny

__all__ = ["tiny"]

TIMES = ("runtime", "per_second", "time", "memory")


def settings(tmp_path, **more):
    shared = dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.05, optim="sgd",
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, seed=0,
    )  # fmt: skip
    return {**shared, **more}


def make_dpo(tiny, tmp_path, **more):
    rows = [{"prompt": f"Question: {item.question}\n", "chosen": "I do not know.", "rejected": item.answer}
            for item in tiny.world.forget]  # fmt: skip
    args = DPOConfig(**settings(tmp_path, **more))
    return DPOTrainer(tiny.model(), tiny.model(seed=1), args, train_dataset=Dataset.from_list(rows),
                      processing_class=tiny.tokenizer)  # fmt: skip


def make_kto(tiny, tmp_path):
    rows = [{"prompt": f"Question: {item.question}\n", "completion": item.answer, "label": i % 2 == 0}
            for i, item in enumerate(tiny.world.forget)]  # fmt: skip
    args = KTOConfig(**settings(tmp_path))
    return KTOTrainer(tiny.model(), tiny.model(seed=1), args, train_dataset=Dataset.from_list(rows),
                      processing_class=tiny.tokenizer)  # fmt: skip


def make_grpo(tiny, tmp_path):
    rows = [{"prompt": f"Question: {item.question}\n"} for item in tiny.world.forget]
    args = GRPOConfig(**settings(tmp_path, num_generations=4, max_completion_length=8, temperature=0.7, beta=0.1))
    tiny.model().save_pretrained(tmp_path / "model")  # where it finds its reference
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    return GRPOTrainer(model, lambda completions, **_: [float(len(text)) for text in completions], args,
                       train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer)  # fmt: skip


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    lines = [{key: value for key, value in line.items() if not any(time in key for time in TIMES)}
             for line in trainer.state.log_history]  # fmt: skip
    return lines, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("make", [make_dpo, make_kto, make_grpo])
def test_losses_metrics_and_weights_are_trls(tiny, tmp_path, make):
    theirs, their_weights = trained(make(tiny, tmp_path))
    with accelerate_trl():
        lines, weights = trained(make(tiny, tmp_path))
    assert len(lines) == len(theirs) > 2
    assert {"loss", "entropy"} <= lines[0].keys()
    for line, their in zip(lines, theirs, strict=True):
        assert line.keys() == their.keys()
        for key, value in their.items():
            assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for weight, their in zip(weights, their_weights, strict=True):
        torch.testing.assert_close(weight, their, rtol=0, atol=2e-6)


def test_losses_of_a_batch_to_1e_6(tiny, tmp_path):
    trainer = make_dpo(tiny, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    with accelerate_trl(budget_bytes=1 << 16):
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-6)
    assert loss.requires_grad


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_every_number_and_gradient_is_its_kernels(softcap, scale):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 16), 2 * torch.randn(33, 16), torch.randn(33)
    targets = torch.randint(0, 33, (7,))
    targets[0] = (softcap_free(hidden, weight, bias))[0]
    results = []
    for kernel in (utils._ChunkedLogProbFunction.apply, token_numbers):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        numbers = kernel(*leaves, targets, 0.7, 8, softcap, scale, ours.HAS)
        (numbers[0].sin() + numbers[1].square()).sum().backward()
        results.append((numbers, [leaf.grad for leaf in leaves]))
    (theirs, their_gradients), (numbers, gradients) = results
    assert numbers[2] is theirs[2] is None
    assert numbers[4].tolist() == theirs[4].tolist()
    assert numbers[4][0]
    for i in (0, 1, 3):
        torch.testing.assert_close(numbers[i], theirs[i], rtol=1e-5, atol=1e-5)
    for gradient, their in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, their, rtol=1e-4, atol=1e-5)


def softcap_free(hidden, weight, bias):
    return (hidden @ weight.T + bias).argmax(-1)


def test_under_autocast_as_theirs(tiny, tmp_path):
    hidden, weight, targets = torch.randn(5, 16), torch.randn(33, 16), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)[0]
        logp = token_numbers(hidden, weight, None, targets, 1.0, 64)[0]
    torch.testing.assert_close(logp, theirs, rtol=0, atol=0.05)
    assert logp.dtype == torch.float32


def test_trl_is_as_before_afterwards():
    before = utils._ChunkedLogProbFunction, utils._use_triton
    with accelerate_trl():
        assert utils._ChunkedLogProbFunction is not before[0]
    with contextlib.suppress(KeyError), accelerate_trl():
        raise KeyError
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_what_it_refuses(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="outputs='log_sum_sq_probs': did you mean log_probs"), accelerate_trl():
        make_dpo(tiny, tmp_path, use_weighting=True).train()
    with pytest.raises(ValueError, match=r"logit_scale=0\.0: needs a number > 0"):
        token_numbers(torch.ones(1, 2), torch.ones(3, 2), None, torch.tensor([0]), 1.0, 64, None, 0.0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl.trainer", None)
        with pytest.raises(ImportError, match=r"accelerate_trl: needs trl: .* pip install"), accelerate_trl():
            pass
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", copy)
    with pytest.raises(RuntimeError, match=r"trl [\d.]+: trl.trainer.utils needs .* got none"), accelerate_trl():
        pass
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", type("Other", (), {"forward": lambda ctx, logits: math.nan}))
    with pytest.raises(RuntimeError, match=r"got \('logits',\)"), accelerate_trl():
        pass
