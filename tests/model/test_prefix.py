"""The tokens that all samples begin with, computed once a draw: the same scores, or they are not shared."""

from __future__ import annotations

import inspect
import logging
import re

import peft
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import pyunlearn as pu
from pyunlearn import _declined

from ..float64 import LLAMA, make_model
from ..mrd.conftest import any_model, make_rows, model, pad  # noqa: F401 (fixtures)
from ..mrd.test_mrd import score, written_out

PREFIX = [5, 9, 3, 7]


def with_prefix(prefix=PREFIX, seed=1):
    rows = make_rows(seed)
    return [(prefix + ids, [-100] * len(prefix) + labels) for ids, labels in rows]


def test_the_scores_are_those_of_whole_samples(any_model):  # noqa: F811
    batch = pad(with_prefix(), 15)
    result = score(any_model, [batch])
    assert result.diagnostics["shared_prefix"] == len(PREFIX)
    expected = written_out(any_model, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("mode", ["overlay", "streamed", "copy"])
def test_every_mode_of_perturbation_shares_it(mode):
    batch, llama = pad(with_prefix(), 15), make_model("llama")
    result = score(llama, [batch], mode=mode)
    assert result.diagnostics["shared_prefix"] == len(PREFIX)
    expected = written_out(llama, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-6, atol=1e-12)


def test_adapters_share_it_too():
    batch = pad(with_prefix(), 15)
    adapted = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    result = score(adapted, [batch], parameters=[name for name, _ in adapted.named_parameters()])
    assert result.diagnostics["shared_prefix"] == len(PREFIX)
    expected = written_out(adapted, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)


def test_it_ends_where_the_first_scored_token_is_predicted(any_model):  # noqa: F811
    rows = [(ids, [-100] * 3 + ids[3:]) for ids, _ in with_prefix()]  # PREFIX[3] is scored
    batch = pad(rows, 15)
    result = score(any_model, [batch])
    assert result.diagnostics["shared_prefix"] == 2
    expected = written_out(any_model, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)


def test_it_is_not_shared_where_that_spares_nothing(model, caplog):  # noqa: F811
    shared = "which spares {} of {}, under a tenth"
    for rows, reason in (
        (make_rows(), "the 3 samples share 0 tokens, " + shared.format(0, 26)),
        (with_prefix()[:1], "the 1 samples share 7 tokens, " + shared.format(0, 15)),
        ([*with_prefix([5]), ([6, 4, 8], [-100, -100, 8])], "the 4 samples share 0 tokens, " + shared.format(0, 32)),
    ):
        _declined._logged.clear()  # it is logged once
        with caplog.at_level(logging.INFO, "pyunlearn"):
            diagnostics = score(model, [pad(rows, 15)]).diagnostics
        assert diagnostics["shared_prefix"] == 0
        assert diagnostics["declined"] == {"shared prefix": reason}
        assert f"shared prefix is not used: {reason}" in caplog.text


NAMES = ("cache", "past_key_values")  # of the argument, since transformers 5.24 and before
NEW = NAMES[0] in inspect.signature(LlamaForCausalLM.forward).parameters


class Renamed(LlamaForCausalLM):
    """Takes its cache by the name that this version of transformers does not have."""

    if NEW:

        def forward(self, *args, past_key_values=None, **kwargs):
            return super().forward(*args, cache=past_key_values, **kwargs)

    else:

        def forward(self, *args, cache=None, **kwargs):
            return super().forward(*args, past_key_values=cache, **kwargs)


class Forgetful(LlamaForCausalLM):
    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class Without(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class Confused(LlamaForCausalLM):
    """Whoever comes with a cache gets the positions of one who comes without."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        place = torch.arange(input_ids.size(1))[None]
        cache = {NAMES[not NEW]: past_key_values}
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=place, **cache, **kwargs)


class Hybrid(LlamaForCausalLM):
    """Its cache cannot be handed to several rows, as that of models with linear attention."""

    def forward(self, *args, **kwargs):
        cache = kwargs.get(NAMES[not NEW])
        output = super().forward(*args, **kwargs)
        if cache is not None:
            cache.layers[0].batch_repeat_interleave = None
        return output

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)


SMALL = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
MAMBA = MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2, state_size=4)
OTHERS = {
    "another name for the cache": (Renamed, LlamaConfig(**SMALL), 4, None),
    "drops the cache": (Forgetful, LlamaConfig(**SMALL), 0, "leaves no keys and values"),
    "takes no cache": (Without, LlamaConfig(**SMALL), 0, "has no argument cache or past_key_values"),
    "other numbers with it": (Confused, LlamaConfig(**SMALL), 0, "the likelihoods of Confused are others with it"),
    "cannot repeat its cache": (Hybrid, LlamaConfig(**SMALL), 0, r"does not go on from a cache of them \(TypeError\)"),
    "recurrent": (MambaForCausalLM, MAMBA, 0, "leaves no keys and values|has no argument"),
    "a window longer than it": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6), 4, None),
    "a window shorter than it": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=3), 4, None),
    "windows in every other layer": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, sliding_window=3), 4, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_share_it_or_are_right_without(name):
    kind, config, expected, reason = OTHERS[name]
    torch.manual_seed(0)
    other = kind(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    rows = with_prefix()
    result = score(other, [pad(rows, 15)], "initial", sigma=0.01)
    assert result.diagnostics["shared_prefix"] == expected
    declined = result.diagnostics["declined"]
    assert declined == {} if reason is None else re.search(reason, declined["shared prefix"])
    alone = [pu.mrd(other, [pad([row], len(row[0]))], "initial", 6, sigma=0.01, seed=5, check_draws=0, progress=False)
             for row in rows]  # fmt: skip
    torch.testing.assert_close(result.value, torch.cat([one.value for one in alone]), rtol=1e-3, atol=1e-4)
