"""Heads under peft: LoRA's factors and the copies of modules_to_save, against the logits of peft's own forward."""

import copy

import peft
import pytest
import torch

from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_hidden, supervised_stats
from pyunlearn.ops import projection

from .test_forward import make, plain


def adapted(name="llama", **options):
    """A tiny model under peft, its adapters far from their start at zero."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], **options}
    model = peft.get_peft_model(make(name), peft.LoraConfig(**options))
    move(model)
    return model.eval()


def move(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


CASES = {
    "lora": dict(),
    "rank-stabilised": dict(use_rslora=True),
    "bias": dict(lora_bias=True),
    "copy": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", ["llama", "phi_bias", "gemma2_softcap"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_pefts_own_forward(name, options, batch):
    ours = adapted(name, **options)
    theirs = copy.deepcopy(ours)
    weights = torch.randn(10, generator=torch.Generator().manual_seed(2))
    stats, _ = supervised_stats(ours, batch, ("logp", "entropy"))
    logp, targets = plain(theirs, batch)
    entropy, logp = -(logp.exp() * logp).sum(-1), logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(stats.logp, logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    (weights * stats.logp + stats.entropy).sum().backward()
    (weights * logp + entropy).sum().backward()
    trained = 0
    for (where, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), where
        if a.grad is not None:
            trained += "lm_head" in where
            torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=2e-4, msg=lambda m, where=where: f"{where}: {m}")
    assert trained > 0
    CausalLM.of(ours).check_head()
    CausalLM.of(adapted(name, **options).bfloat16()).check_head()


def test_the_frozen_weight_costs_no_gradient(batch, monkeypatch):
    """Of d(logits) only products with H and r columns are made: none is as large as the head."""
    shapes, product = [], projection.product
    monkeypatch.setattr(
        projection, "product", lambda a, b, out, add: shapes.append(out.shape) or product(a, b, out, add)
    )
    supervised_stats(adapted(), batch)[0].logp.sum().backward()
    assert sorted(map(tuple, shapes)) == [(10, 4), (10, 32), (61, 4)]


def test_adapters_in_float32_over_a_half_precision_model(batch):
    """peft keeps adapters in float32; the head's GEMMs run in the model's dtype."""
    model = peft.get_peft_model(make("llama").bfloat16(), peft.LoraConfig(target_modules=["lm_head"], r=4))
    move(model)
    assert CausalLM.of(model).read_head().lora[0].up.weight.dtype == torch.float32
    stats, _ = supervised_stats(model, batch)
    stats.logp.sum().backward()
    exact = copy.deepcopy(model).float()
    exact.zero_grad()
    logp, targets = plain(exact, batch)
    logp = logp.gather(1, targets[:, None])[:, 0]
    logp.sum().backward()
    torch.testing.assert_close(stats.logp, logp, atol=0.15, rtol=0)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.grad is not None:
            assert ours.grad.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0) > 0.999


def test_the_head_follows_what_peft_has_switched(batch):
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    move(model)
    expected = {}

    def compare(name):
        with torch.no_grad():
            expected[name], targets = plain(model, batch)
            stats, _ = supervised_stats(model, batch)
        torch.testing.assert_close(stats.logp, expected[name].gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-5)

    compare("both")
    assert [part.up.out_features for part in CausalLM.of(model).read_head().lora] == [61, 61]
    model.set_adapter("default")
    compare("one")
    with model.disable_adapter():
        compare("none")
    model.merge_adapter()
    compare("merged")
    assert CausalLM.of(model).read_head().lora == ()
    assert (expected["both"] - expected["one"]).abs().max() > 0.1
    assert (expected["none"] - expected["one"]).abs().max() > 0.1
    torch.testing.assert_close(expected["merged"], expected["one"], atol=1e-4, rtol=1e-4)


def test_a_switched_off_copy_is_the_original(batch):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_output_embeddings()
    assert CausalLM.of(model).read_head().weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert CausalLM.of(model).read_head().weight is wrapper.original_module.weight


def test_dropout_belongs_to_training(batch):
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(supervised_stats(model, batch)[0].logp, supervised_stats(model, batch)[0].logp)
        model.train()
        assert not torch.equal(supervised_stats(model, batch)[0].logp, supervised_stats(model, batch)[0].logp)


def test_a_reference_under_lora(batch):
    model, reference = make("llama"), adapted()
    with torch.no_grad():
        pair = supervised_hidden(reference, batch).hidden, CausalLM.of(reference).read_head()
        stats, _ = supervised_stats(model, batch, ("kl_pq", "kl_qp"), reference=pair)
        p, q = plain(model, batch)[0], plain(reference, batch)[0]
    torch.testing.assert_close(stats.kl_pq, (p.exp() * (p - q)).sum(-1), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(stats.kl_qp, (q.exp() * (q - p)).sum(-1), atol=2e-5, rtol=1e-3)


def test_merged_is_what_peft_merges(batch):
    model = adapted()
    head = CausalLM.of(model).read_head().merged()
    assert head.lora == ()
    model.merge_adapter()
    torch.testing.assert_close(head.weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["lm_head"], use_dora=True),
        peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10),
        peft.LoHaConfig(target_modules=["lm_head"]),
    ],
    ids=["dora", "adalora", "loha"],
)
def test_other_adapters_are_refused(config):
    model = peft.get_peft_model(make("llama"), config)
    with pytest.raises(TypeError, match=r"its head is a peft\..*, needs.*only plain LoRA and modules_to_save"):
        CausalLM.of(model).read_head()
