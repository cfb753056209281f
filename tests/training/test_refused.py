"""Models, references and heads that would be trained on another loss than is said, each refused in a sentence."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import pyunlearn as pu
from pyunlearn.metrics import teacher_forced
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_stats
from pyunlearn.model.reference import AdapterOff, Live
from pyunlearn.training.terms import make_terms
from pyunlearn.training.trainer import UnlearnTrainer

from ..tiny import SIZES


def trained(tiny, args, model, objectives=("ga",), reference=None):
    trainer = UnlearnTrainer(
        model=model, args=args, train_dataset=tiny.pairs(), objectives=objectives, reference=reference
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


# ---- heads -----------------------------------------------------------------------------------------------------------


class Quadruple(nn.Linear):
    def forward(self, x):
        return 4 * super().forward(x)


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


class Sliced(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :-4]
        return out


def with_head(kind, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=384, **SIZES)
    if isinstance(kind, type) and issubclass(kind, LlamaForCausalLM):
        return kind(config)
    model = LlamaForCausalLM(config)
    head = kind(SIZES["hidden_size"], 384, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


HEADS = {
    Quadruple: r"output layer's weight \(Quadruple\) with softcap=None, temperature=1: (\S+) and (\S+), say",
    Scaled: r"Scaled: its logits are not .*: (\S+) and (\S+), say",
    Sliced: r"shapes \(\d, 2, 380\) and \(\d, 2, 384\)",
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_more_than_its_weight_is_refused(tiny, arguments, kind):
    message = HEADS[kind]
    pairs = tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(2)])["forget"]
    for bf16 in (False, True):
        with pytest.raises(ValueError, match=message):
            trained(tiny, arguments(bf16=bf16), with_head(kind))
    with pytest.raises(ValueError, match=message) as caught:
        supervised_stats(with_head(kind), batch)
    if kind is Quadruple:
        theirs, ours = map(float, re.search(message, str(caught.value)).groups())
        assert theirs == pytest.approx(4 * ours, rel=1e-3)
    for objectives in (["npo"], ["kl"]):
        with pytest.raises(ValueError, match=message):
            trained(tiny, arguments(), tiny.model(), objectives, reference=with_head(kind))
    trained(tiny, arguments(), with_head(kind), [pu.objectives.get("rmu", layer=1)])  # which reads no head


def test_a_head_of_a_class_of_its_own_that_is_its_weight_is_taken(tiny, arguments):
    class Named(nn.Linear):
        pass

    ours, plain = (trained(tiny, arguments(), with_head(kind))[0]["loss"] for kind in (Named, nn.Linear))
    assert ours == plain


# ---- references ------------------------------------------------------------------------------------------------------


def test_the_model_itself_is_no_reference(tiny, arguments):
    model = tiny.model()
    for reference in (model, Live(model), {"forget": model}):
        with pytest.raises(ValueError, match=r"reference\['forget'\]: needs weights of its own, 'model\.embed_tokens"):
            trained(tiny, arguments(), model, ["npo"], reference)
    part = tiny.model(seed=1)
    part.model.layers[1] = model.model.layers[1]
    view = copy.deepcopy(model)
    view.model.norm.weight = nn.Parameter(model.model.norm.weight.detach()[:])
    for reference, name in ((part, "layers.1"), (view, "norm.weight")):
        with pytest.raises(ValueError, match=rf"needs weights of its own, '[\w.]*{name}.*give copy\.deepcopy\(model\)"):
            trained(tiny, arguments(), model, ["npo"], reference)
    log = trained(tiny, arguments(max_steps=2), model, ["npo"], copy.deepcopy(model))
    assert log[0]["loss"] == pytest.approx(2 / 0.1 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert log[1]["loss"] < log[0]["loss"] - 0.01


def test_frozen_weights_may_be_shared(tiny, arguments):
    base = tiny.model()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    other = tiny.model(seed=1)
    other.model.embed_tokens = base.model.embed_tokens  # frozen by the adapters
    assert trained(tiny, arguments(), model, ["npo"], other)
    with pytest.raises(ValueError, match=r"'[\w.]*lora_A.*AdapterOff\(model\)"):
        trained(tiny, arguments(), model, ["npo"], base)
    assert trained(tiny, arguments(), model, ["npo"], AdapterOff(model))


# ---- mixtures of experts ---------------------------------------------------------------------------------------------

MOE = {"vocab_size": 384, "num_experts_per_tok": 2, "max_position_embeddings": 256, **SIZES}
EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **MOE)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, **MOE)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=4, **MOE)),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_a_routers_auxiliary_loss_is_refused(tiny, arguments, name):
    torch.manual_seed(0)
    model = EXPERTS[name]().eval()
    expected = teacher_forced(model, tiny.forget, progress=False)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits=True asks for an auxiliary loss.*set it to False"):
        trained(tiny, arguments(), model)
    assert CausalLM.of(model).config.output_router_logits
    assert teacher_forced(model, tiny.forget, progress=False) == expected
    model.config.output_router_logits = False
    assert trained(tiny, arguments(), model)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([("ga", "1")], "the coefficient of 'ga' needs to be a number, got '1'"),
        ([("ga", None)], "the coefficient of 'ga' needs to be a number, got None"),
        ([("ga", True)], "the coefficient of 'ga' needs to be a number, got True"),
        ([("ga", 0.5, 1)], r"got a tuple of 3: \('ga', 0.5, 1\)"),
        ([("ga",)], r"got a tuple of 1: \('ga',\)"),
        ([("bss", "1")], "the coefficient of 'bss' needs to be a number, got '1'"),
        ([pu.objectives.bss()], r"got a list of 2 pairs, such as bss\(\) gives: put a \* before it"),
        ([["ga", 0.5]], r"needs names, Objectives or pairs \(objective, coefficient\), got \['ga', 0.5\]"),
        (pu.objectives.get("ga"), "objectives: needs a list of names, .* got Objective"),
        (3, "objectives: needs a list of names, .* got int"),
    ],
)
def test_malformed_objectives(objectives, message):
    with pytest.raises(TypeError, match=message):
        make_terms(objectives)


def test_coefficients_of_any_number():
    terms = make_terms([("ga", 2), ("gd", torch.tensor(0.5)), *pu.objectives.bss()])
    assert [term.coefficient for term in terms[:2]] == [2.0, 0.5]
