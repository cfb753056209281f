"""What stands for the reference: a cache, a live model and switched-off adapters say the same."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from pyunlearn.data import collate
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_hidden, supervised_stats
from pyunlearn.model.packing import Packing
from pyunlearn.model.reference import AdapterOff, Cached, Live, Reference, as_reference, as_references
from pyunlearn.training.terms import TermLosses

from .test_cache import make, make_rows

BATCH = collate([make_rows()[i] for i in (2, 0, 4)], 7)
BATCH["text_mask"] = (BATCH["input_ids"] % 3 != 0).long()
LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
POSITIONS = ("supervised", "template_free", "real")


def adapted(seed=0, **options):
    """A model under peft with adapters far from zero, in training mode, with dropout."""
    model = peft.get_peft_model(make(seed), peft.LoraConfig(lora_dropout=0.5, **{**LORA, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.train()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "reference.safetensors"
    options = {"kl": True, "layers": [1, 2], "positions": "real", "progress": False}
    return {
        "cached": Cached(ReferenceCache.build(make(), make_rows(), path, **options)),
        "live": Live(make().train()),
        "adapter off": AdapterOff(adapted()),
    }


@pytest.mark.parametrize("kind", ["cached", "live", "adapter off"])
def test_all_say_what_the_model_says(references, kind):
    reference, model = references[kind], make()
    assert isinstance(reference, Reference)
    for positions in POSITIONS:
        reference.check("reference", positions, True, [1, "deep"])
    reference.to(torch.device("cpu"))
    close = {"rtol": 1e-6, "atol": 1e-6} if kind == "cached" else {"rtol": 0, "atol": 0}
    with torch.no_grad():
        torch.testing.assert_close(reference.scalars(BATCH)["logp"], supervised_stats(model, BATCH)[0].logp, **close)
        for positions in POSITIONS:
            expected = supervised_hidden(model, BATCH, positions, layers=[1, "deep"])
            torch.testing.assert_close(reference.hidden(BATCH, positions), expected.hidden, **close)
            for layer in (1, "deep"):
                hidden = reference.hidden(BATCH, positions, layer)
                torch.testing.assert_close(hidden, expected.layers[layer], **close)
                assert not hidden.requires_grad
    head = reference.head(torch.zeros(1))
    assert torch.equal(head.weight, model.lm_head.weight)
    half = reference.head(torch.zeros(1, dtype=torch.bfloat16))
    assert torch.equal(half.weight, model.lm_head.weight.bfloat16())
    reference.release()
    assert torch.equal(reference.head(torch.zeros(1)).weight, head.weight)


def test_a_cache_of_supervised_tokens_lacks_the_questions(tmp_path):
    cached = Cached(ReferenceCache.build(make(), make_rows(), tmp_path / "cache", kl=True, progress=False))
    cached.check("reference", "supervised", True, [])
    with pytest.raises(ValueError, match=r"at 'template_free' positions, the cache has 'supervised'.*positions='real'"):
        cached.check("reference", "template_free", True, [])


@pytest.mark.parametrize("kind", ["live", "adapter off"])
def test_what_rows_begin_with_goes_through_once(kind):
    """Whatever it says, and however the model is left."""
    model = make() if kind == "live" else adapted()
    reference = Live(model) if kind == "live" else AdapterOff(model)
    batch = {name: value.clone() for name, value in BATCH.items()}
    batch["input_ids"][:, :3] = batch["input_ids"][0, :3]
    plain = [
        reference.scalars(batch)["logp"],
        reference.hidden(batch, "real"),
        reference.hidden(batch, "supervised", 1),
    ]
    reference.packing = Packing()
    packed = [
        reference.scalars(batch)["logp"],
        reference.hidden(batch, "real"),
        reference.hidden(batch, "supervised", 1),
    ]
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert reference.packing.as_dict() == {"used": True, "declined": {}}
    assert reference.packing.tokens < 0.8 * reference.packing.padded
    assert reference.lm.config._attn_implementation == "sdpa"
    assert model.training == (kind == "adapter off")


def test_a_cached_head_moves_once(references):
    cached, like = references["cached"], torch.zeros(1, dtype=torch.bfloat16)
    assert cached.head(like).weight is cached.head(like).weight
    cached.release()


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_switching_adapters_off_leaves_them_as_they_were(options):
    model = adapted(**options)
    model.base_model.model.model.layers[0].eval()
    some = next(p for n, p in model.named_parameters() if p.requires_grad and ".layers.1." in n)
    some.requires_grad_(False)  # peft would switch it on again
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    reference = AdapterOff(model)
    logp = supervised_stats(model, BATCH)[0].logp
    assert torch.equal(reference.scalars(BATCH)["logp"], supervised_stats(make(), BATCH)[0].logp)
    logp.sum().backward()  # a graph of before
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    with pytest.raises(ValueError, match="needs a tensor"):
        reference.scalars({})
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert CausalLM.of(model).read_head().weight is not None


def test_models_whose_base_is_no_reference():
    with pytest.raises(TypeError, match="needs a model under peft, got LlamaForCausalLM"):
        AdapterOff(make())
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="not merged"):
        AdapterOff(merged)
    trained = adapted()
    trained.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight' is trained and no adapter's"):
        AdapterOff(trained)


def test_a_term_takes_any_of_them(references):
    """The same losses and gradients of a LoRA model by its own base as by a second model."""
    losses = []
    for source in ("own", "live", "cached"):
        model = adapted().eval()
        given = AdapterOff(model) if source == "own" else references[source]
        terms = TermLosses(["npo", "kl", ("kl", 0.5)], {"forget": given, "retain": given})
        values = terms.term_losses(model, {"forget": BATCH, "retain": BATCH}, {t.count: 3 for t in terms.terms})
        sum(values).backward()
        losses.append((torch.stack(values).detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        assert len(losses[-1][1]) > 4
        terms.release()
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(map(torch.equal, losses[0][1], losses[1][1]))
    torch.testing.assert_close(losses[2][0], losses[1][0])


def test_sources(references):
    cache, model = references["cached"].cache, make().train()
    assert isinstance(as_reference(cache), Cached)
    assert isinstance(as_reference(model), Live)
    assert not model.training
    assert as_reference(references["live"]) is references["live"]
    with pytest.raises(TypeError, match="needs a ReferenceCache, a frozen model or a Reference, got str"):
        as_reference("model")
    assert as_references(None, ["forget"]) == {}
    assert list(as_references(model, ["forget", "retain"])) == ["forget", "retain"]
    assert list(as_references(cache, ["forget"])) == ["forget"]
    assert as_references(cache, ["forget", "retain"]) == {}  # it is of one data set's rows
    assert list(as_references({"retain": cache, "other": model}, ["forget", "retain"])) == ["retain"]


def test_what_a_cache_does_not_serve(tmp_path):
    cache = ReferenceCache.build(make(), make_rows(), tmp_path / "cache", layers=[1], progress=False)
    cached = Cached(cache)
    cached.check("reference", "supervised", False, ["shallow"])
    for positions, kl, layers, message in (
        ("supervised", True, [], "has none; build it with kl=True, positions='supervised'"),
        ("supervised", True, [1], r"has none; build it with kl=True, layers=\[1\], positions='supervised'"),
        ("real", False, [1], "has 'supervised'; build it with"),
        ("all", False, [1], "padding is never cached: give a live model"),
    ):
        with pytest.raises(ValueError, match=f"reference: the objectives need .*{message}"):
            cached.check("reference", positions, kl, layers)
    with pytest.raises(ValueError, match=r"states of layers \[1\], not of layer 2; build it with layers=\[2\]"):
        cached.check("reference", "supervised", False, [1, "deep"])


def test_modules_of_other_kinds_are_refused():
    with pytest.raises(TypeError, match="needs a transformers causal LM"):
        as_reference(nn.Linear(2, 2))
