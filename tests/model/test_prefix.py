"""The tokens that all samples begin with, computed once a draw: the same scores, or they are not shared."""

from __future__ import annotations

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

from ..float64 import LLAMA, make_model
from ..mrd.conftest import make_rows, pad
from ..mrd.test_mrd import score, written_out

PREFIX = [5, 9, 3, 7]


def with_prefix(prefix=PREFIX, seed=1):
    rows = make_rows(seed)
    return [(prefix + ids, [-100] * len(prefix) + labels) for ids, labels in rows]


def test_the_scores_are_those_of_whole_samples(any_model):
    batch = pad(with_prefix(), 15)
    result = score(any_model, [batch])
    assert result.diagnostics["shared_prefix"] == len(PREFIX)
    expected = written_out(any_model, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("mode", ["overlay", "streamed", "copy"])
def test_every_mode_of_perturbation_shares_it(mode):
    batch, model = pad(with_prefix(), 15), make_model("llama")
    result = score(model, [batch], mode=mode)
    assert result.diagnostics["shared_prefix"] == len(PREFIX)
    expected = written_out(model, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-6, atol=1e-12)


def test_it_ends_where_the_first_scored_token_is_predicted(any_model):
    rows = [(ids, [-100] * 3 + ids[3:]) for ids, _ in with_prefix()]  # PREFIX[3] is scored
    batch = pad(rows, 15)
    result = score(any_model, [batch])
    assert result.diagnostics["shared_prefix"] == 2
    expected = written_out(any_model, batch, lambda a, b: (a - b) / a)
    torch.testing.assert_close(result.draws, expected, rtol=1e-8, atol=1e-14)


def test_it_is_not_shared_where_that_spares_nothing(model):
    for rows in (make_rows(), with_prefix()[:1], [*with_prefix([5]), ([6, 4, 8], [-100, -100, 8])]):
        assert score(model, [pad(rows, 15)]).diagnostics["shared_prefix"] == 0


class Forgetful(LlamaForCausalLM):
    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


SMALL = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
OTHERS = {
    "takes no cache": (Forgetful, LlamaConfig(**SMALL), 0),
    "recurrent": (MambaForCausalLM, MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2, state_size=4), 0),
    "a window longer than it": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6), 4),
    "a window shorter than it": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=3), 4),
    "every other layer has a window": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, sliding_window=3), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_share_it_or_are_right_without(name):
    kind, config, expected = OTHERS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    rows = with_prefix()
    result = score(model, [pad(rows, 15)], "initial", sigma=0.01)
    assert result.diagnostics["shared_prefix"] == expected
    alone = [pu.mrd(model, [pad([row], len(row[0]))], "initial", 6, sigma=0.01, seed=5, check_draws=0, progress=False)
             for row in rows]  # fmt: skip
    torch.testing.assert_close(result.value, torch.cat([one.value for one in alone]), rtol=1e-3, atol=1e-4)
