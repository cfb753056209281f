"""`token_stats_of` against log_softmax of the model's own logits, in the batch's shape."""

import copy

import pytest
import torch
from torch import nn

import pyunlearn as pu
from pyunlearn.data import collate

from .variants import V, make


def plain(model, batch, mask):
    """(B, T - 1) logp and (B, T - 1, V) log-probabilities, 0 where nothing counts."""
    log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask, log_p


def flipped(batch):
    """The same rows with their padding on the left."""
    lengths = batch["attention_mask"].sum(1).tolist()
    width = batch["input_ids"].size(1)
    return {key: torch.stack([row.roll(width - n) for row, n in zip(value, lengths, strict=True)])
            for key, value in batch.items()}  # fmt: skip


@pytest.mark.parametrize("positions", ["supervised", "real"])
def test_values_and_gradients_are_the_plain_ones(variant, batch, positions):
    real = (batch["attention_mask"][:, 1:] != 0) & (batch["attention_mask"][:, :-1] != 0)
    mask = batch["labels"][:, 1:] != -100 if positions == "supervised" else real
    ours, theirs = copy.deepcopy(variant), copy.deepcopy(variant)
    stats = pu.token_stats_of(ours, batch, ("logp", "entropy", "greedy"), positions=positions)
    logp, log_p = plain(theirs, batch, mask)
    entropy = -(log_p.exp() * log_p).sum(-1) * mask
    assert torch.equal(stats.mask, mask)
    assert stats.declined == {}
    assert stats.greedy.dtype == torch.bool
    torch.testing.assert_close(stats.logp, logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    weights = torch.randn(mask.shape)
    (weights * stats.logp + stats.entropy).sum().backward()
    (weights * logp + entropy).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_on_the_left_moves_nothing_else(llama, batch):
    stats, left = (pu.token_stats_of(llama, each) for each in (batch, flipped(batch)))
    for side in (stats, left):
        assert not side.logp[~side.mask].any()
    torch.testing.assert_close(left.logp[left.mask], stats.logp[stats.mask])


class Doubled(nn.Linear):
    """A head that is no plain matrix product."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_is_not_known_leaves_the_models_own_logits(batch):
    model = make("llama")
    head = Doubled(32, V, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    reference = make("llama", seed=1)
    with pytest.raises(ValueError, match="its logits are not those of its output layer's weight"):
        pu.model.forward.supervised_stats(model, batch)
    for each in (batch, flipped(batch)):
        stats = pu.token_stats_of(model, each, ("logp", "kl_pq"), reference=reference, budget_bytes=1 << 20)
        assert "its logits are not those" in stats.declined["fused head"]
        mask = batch["labels"][:, 1:] != -100
        logp, log_p = plain(model, batch, mask)
        log_q = plain(reference, batch, mask)[1]
        torch.testing.assert_close(stats.logp[stats.mask], logp[mask])
        torch.testing.assert_close(stats.kl_pq[stats.mask], (log_p.exp() * (log_p - log_q)).sum(-1)[mask])
    stats.logp.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_references(model, rows, path):
    """A cache serves as the reference, and as the model whose logp is wanted."""
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(1.1)
    cache = pu.ReferenceCache.build(frozen, rows, path, kl=True, progress=False)
    batch = collate([rows[i] for i in (2, 0, 1)], 0)
    live = pu.token_stats_of(model, batch, ("logp", "kl_pq"), reference=frozen)
    cached = pu.token_stats_of(model, batch, ("logp", "kl_pq"), reference=cache)
    torch.testing.assert_close(cached.kl_pq, live.kl_pq)
    assert live.kl_pq.sum() > 1e-3
    with torch.no_grad():
        expected = pu.token_stats_of(frozen, batch)
    found = pu.token_stats_of(cache, batch)
    torch.testing.assert_close(found.logp, expected.logp)
    assert torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "all"}, "positions='all': needs 'supervised', 'real' or 'followed'"),
        ({"outputs": "kl_pq"}, "reference=NoneType: needs reference=, a frozen model or ReferenceCache"),
        ({"reference": "itself"}, r"reference=str: needs kl_pq or kl_qp in outputs"),
        ({"outputs": "loggp"}, "loggp"),
        ({"batch": {"input_ids": torch.ones(1, 3, dtype=torch.int64)}}, r"batch\['labels'\]: needs a tensor"),
    ],
)
def test_bad_input_is_named(llama, batch, options, message):
    with pytest.raises(ValueError, match=message):
        pu.token_stats_of(llama, options.pop("batch", batch), **options)


def test_a_cache_has_logp_alone(model, rows, path):
    cache = pu.ReferenceCache.build(model, rows, path, progress=False)
    batch = collate([rows[0]], 0)
    with pytest.raises(ValueError, match="a ReferenceCache has 'logp' of supervised tokens and nothing else"):
        pu.token_stats_of(cache, batch, "entropy")


def test_names_that_are_imported_late_are_listed():
    assert {"token_stats_of", "UnlearnTrainer", "ReferenceCache", "token_stats", "__version__"} <= {*dir(pu)}
    assert {*pu.__all__} <= {*dir(pu)}
    with pytest.raises(AttributeError, match="no attribute 'token_stat'"):
        pu.token_stat  # noqa: B018


def test_what_is_no_model_or_no_batch_is_named(tiny):
    batch = {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}
    for model, given, kind, message in (
        ("gpt2", batch, TypeError, "model: needs a causal LM or a ReferenceCache, got str"),
        (tiny.model(), [1], TypeError, "batch: needs a mapping with input_ids, attention_mask and labels, got list"),
        (tiny.model(), batch, ValueError, r"batch: input_ids is empty, of shape \(0, 4\)"),
    ):
        with pytest.raises(kind, match=message):
            pu.token_stats_of(model, given)
    with pytest.raises(ValueError, match="option='budget': did you mean budget_bytes"):
        pu.token_stats_of(tiny.model(), {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, budget=3)
