"""Rows that go through a model together say what they say alone, values and gradients, or they do not go together."""

from __future__ import annotations

import contextlib
import copy
import logging

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunlearn import _declined
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_hidden
from pyunlearn.model.packing import Packing, attending
from pyunlearn.model.tree import Rows, Tree, grow

from .test_packed import Tokens
from .zoo import MORE, ZOO, V, make

# whose attention is their own, or who have more than attention between tokens; and who see less than these rows
OWN = {"bloom", "falcon", "mpt", "mamba", "mamba2", "rwkv", "jamba", "bamba", "stablelm"}
WINDOWED = {"mistral", "gemma2", "gemma3"}
POSITIONS = {"forget": "supervised", "retain": "real"}


def make_batch(lengths, prefix=4, seed=0, left=False, more=1):
    """Rows that begin with the same `prefix` tokens, of which the one after them is not scored either."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(3, V, (prefix,), generator=torch.Generator().manual_seed(99))
    width = max(lengths) + more
    ids, labels = torch.zeros(len(lengths), width, dtype=torch.int64), torch.full((len(lengths), width), -100)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        at = slice(width - length, width) if left else slice(0, length)
        row = torch.cat([start, torch.randint(3, V, (max(length - prefix, 0),), generator=draw)])[:length]
        ids[i, at], mask[i, at] = row, 1
        row = row.clone()
        row[: prefix + 1] = -100
        labels[i, at] = row
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.arange(len(lengths))}


BATCHES = {"forget": make_batch((9, 6, 8)), "retain": make_batch((7, 10), seed=1, left=True)}


def beginnings(batches):
    """Of all rows, without their last tokens, which predict nothing."""
    rows = [
        ids[mask != 0].tolist()
        for own in batches.values()
        for ids, mask in zip(*map(own.get, ("input_ids", "attention_mask")), strict=True)
    ]
    return {tuple(row[:end]) for row in rows for end in range(1, len(row))}


TOKENS = len(beginnings(BATCHES))


def together(model, batches=BATCHES, positions=POSITIONS, packing=None, **options):
    packing = Packing() if packing is None else packing
    with packing:
        return packing.hidden(model, batches, positions, **options), packing


def alone(model, batches=BATCHES, positions=POSITIONS, layers=None):
    """Every row a batch of its own."""
    found = {}
    for kind, batch in batches.items():
        rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]
        each = [supervised_hidden(model, row, positions[kind], layers=(layers or {}).get(kind, ())) for row in rows]
        found[kind] = {
            "hidden": torch.cat([one.hidden for one in each]),
            "targets": torch.cat([one.targets for one in each]),
            "owners": torch.cat([one.sequence_ids + i for i, one in enumerate(each)]),
            **{layer: torch.cat([one.layers[layer] for one in each]) for layer in (layers or {}).get(kind, ())},
        }
    return found


def gradients(model, *hidden):
    """Of all weights, of a sum that has another weight for every number."""
    model.zero_grad()
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).cos()).sum() for x in hidden)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, found, layers=None, batches=BATCHES, positions=POSITIONS, tolerance=1e-5):
    expected = alone(model, batches, positions, layers)
    for kind, own in found.items():
        torch.testing.assert_close(own.hidden, expected[kind]["hidden"], atol=tolerance, rtol=tolerance)
        assert torch.equal(own.targets, expected[kind]["targets"])
        assert torch.equal(own.sequence_ids, expected[kind]["owners"])
        assert own.num_sequences == len(batches[kind]["input_ids"])
        for layer, states in own.layers.items():
            torch.testing.assert_close(states, expected[kind][layer], atol=tolerance, rtol=tolerance)
    ours = gradients(model, *(x for own in found.values() for x in (own.hidden, *own.layers.values())))
    theirs = gradients(
        model,
        *(x for kind in found for x in (expected[kind]["hidden"], *(expected[kind][i] for i in found[kind].layers))),
    )
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(gradient, theirs[name], atol=10 * tolerance * scale + tolerance, rtol=0)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", sorted(ZOO | MORE))
def test_every_kind_of_model_says_the_same_or_is_left_alone(name, attention, caplog):
    try:
        model = make(name, attention=attention)
    except ValueError:
        pytest.skip("transformers has no such attention for it")
    _declined._logged.clear()
    with caplog.at_level(logging.INFO, "pyunlearn"):
        found, packing = together(model, layers={"forget": [1]})
    if name in OWN | WINDOWED:
        reason = packing.declined["packed rows"]
        assert not found
        assert ("sliding_window" in reason) == (name in WINDOWED)
        assert f"packed rows is not used: {reason}" in caplog.text
        assert packing.as_dict() == {"used": False, "declined": {"packed rows": reason}}
        return
    assert packing.as_dict() == {"used": True, "declined": {}}
    assert (packing.tokens, packing.padded) == (TOKENS, 3 * 10 + 2 * 11)
    check(model, found, {"forget": [1]})


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "phi", "cohere"])
def test_in_float64_nothing_is_left_between_the_two_ways(name):
    model = make(name, torch.float64)
    found, packing = together(model)
    assert packing.proved
    check(model, found, tolerance=2e-7)  # norms and rotary factors of some are float32 all the same


def test_it_is_no_further_from_float64_than_rows_alone():
    model, exact = make("llama"), make("llama", torch.float64)
    truth = alone(exact)
    ours, theirs = together(model)[0], alone(model)
    for kind in BATCHES:
        error = (ours[kind].hidden.double() - truth[kind]["hidden"]).abs().max()
        plain = (theirs[kind]["hidden"].double() - truth[kind]["hidden"]).abs().max()
        assert error <= plain + 1e-6
    truth = gradients(exact, *(own["hidden"] for own in truth.values()))
    found = gradients(model, *(own.hidden for own in ours.values()))
    plain = gradients(model, *(own["hidden"] for own in theirs.values()))
    for name, exactly in truth.items():
        error, other = ((x[name].double() - exactly).norm() for x in (found, plain))
        assert error <= 1.5 * other + 1e-6 * exactly.norm()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 6), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
def test_any_rows(forget, retain, prefix, left, real, more, seed):
    model = MODEL
    batches = {
        "forget": make_batch(forget, prefix, seed, left, more),
        "retain": make_batch(retain, prefix, seed + 1, not left, more),
    }
    positions = {"forget": "real" if real else "supervised", "retain": "supervised"}
    found, packing = together(model, batches, positions)
    if not found:
        assert not packing.declined  # there is nothing that counts
        assert not sum(len(own["targets"]) for own in alone(model, batches, positions).values())
        return
    assert packing.proved
    check(model, found, batches=batches, positions=positions)


MODEL = make("llama")


def test_rows_that_go_on_alike_share_all_of_it():
    """The prompt of an answer and its refusal, and scored tokens too, each of which counts once a row."""
    first = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]), "labels": torch.tensor([[-100, -100, 7, 8, 9, 10]])}
    second = {"input_ids": torch.tensor([[5, 6, 7, 8, 11], [5, 6, 7, 8, 9]]), "labels": torch.full((2, 5), -100)}
    second["labels"][:, 2:] = second["input_ids"][:, 2:]
    batches, positions = {"a": first, "b": second}, {"a": "supervised", "b": "supervised"}
    found, packing = together(MODEL, batches, positions)
    assert packing.tokens == 5  # 5 6 7 8 9: the others' last tokens predict nothing
    assert packing.padded == 6 + 10
    check(MODEL, found, batches=batches, positions=positions)


def test_a_row_does_not_depend_on_who_else_is_there():
    model = make("qwen2")
    one = {"forget": {name: value[:1] for name, value in BATCHES["forget"].items()}}
    whole = together(model)[0]["forget"]
    single = together(model, one)[0]["forget"]
    torch.testing.assert_close(whole.hidden[: len(single.hidden)], single.hidden, atol=1e-6, rtol=1e-6)


def test_the_model_is_run_on_these_tokens_and_no_others():
    model, packing = make("llama"), Packing()
    together(model, packing=packing)
    tokens = Tokens(model)
    found, _ = together(model, packing=packing)
    assert tokens.count == TOKENS == packing.tokens // 2
    tokens.count = 0
    gradients(model, found["forget"].hidden)
    assert tokens.count == 0


def test_rows_may_be_kept_whole():
    packing = together(MODEL, packing=Packing(share=False))[1]
    assert packing.as_dict() == {"used": True, "declined": {}}
    assert packing.tokens == 8 + 5 + 7 + 6 + 9


def test_same_seed_same_bits():
    model = make("llama")
    runs = [together(model)[0] for _ in range(2)]
    a, b = (gradients(model, *(own.hidden for own in found.values())) for found in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_activations_may_be_computed_again_in_the_backward(reentrant):
    model = make("llama").train()
    plain = gradients(model, *(own.hidden for own in together(model)[0].values()))
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with Packing() as packing:
        found = packing.hidden(model, BATCHES, POSITIONS)
        again = gradients(model, *(own.hidden for own in found.values()))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_layers_alone_end_the_forward_at_the_deepest():
    model = make("llama")
    blocks = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: blocks.append(1))
    packing = Packing()
    together(model, layers={"forget": [1], "retain": [1]}, through_head=False, packing=packing)
    blocks.clear()
    found, _ = together(model, layers={"forget": [1], "retain": [1]}, through_head=False, packing=packing)
    assert len(blocks) == 1  # where it ends
    expected = alone(model, layers={"forget": [1], "retain": [1]})
    for kind, own in found.items():
        torch.testing.assert_close(own.layers[1], expected[kind][1])


def test_adapters():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found, packing = together(model)
    assert packing.as_dict() == {"used": True, "declined": {}}
    check(model, found)


def test_autocast():
    model = make("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, packing = together(model)
        expected = alone(model)
    assert packing.proved
    for kind, own in found.items():
        error = (own.hidden - expected[kind]["hidden"]).norm() / expected[kind]["hidden"].norm()
        assert error < 0.02
    ours = gradients(model, *(own.hidden.float() for own in found.values()))
    theirs = gradients(model, *(own["hidden"].float() for own in expected.values()))
    for name in ours:
        assert (ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm() + 1e-6, name


def test_bfloat16_weights():
    model = make("llama", torch.bfloat16)
    found, packing = together(model)
    assert packing.proved
    for kind, own in alone(model).items():
        assert (found[kind].hidden - own["hidden"]).norm() < 0.05 * own["hidden"].norm()


# ---- what is not packed, or not shared, is told ----------------------------------------------------------------------


def test_rows_draw_their_own_dropout():
    model = make("gpt2").train()
    packing = together(model)[1]
    assert "dropout" in packing.declined["shared tokens"]
    assert packing.as_dict()["used"]
    assert packing.tokens == sum((8, 5, 7, 6, 9))
    model.eval()
    assert together(model)[1].tokens == TOKENS
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert "dropout" in together(model.train())[1].declined["shared tokens"]
    torch.manual_seed(0)
    first = together(model)[0]["forget"].hidden
    assert not torch.equal(first, together(model)[0]["forget"].hidden)  # it is drawn


def test_kinds_that_count_padding_stay_as_they_are():
    found, packing = together(MODEL, positions={"forget": "followed", "retain": "real"})
    assert list(found) == ["retain"]
    assert "count padding" in packing.declined["packed rows"]
    check(MODEL, found, positions={"retain": "real"}, batches={"retain": BATCHES["retain"]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_type_ids": torch.zeros(3, 10, dtype=torch.int64)}, "token_type_ids"),
        ({"attention_mask": torch.ones(3, 12, dtype=torch.int64)}, "another shape"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1, 0]] * 3)}, "padding between"),
    ],
)
def test_odd_batches_stay_as_they_are(change, says):
    found, packing = together(MODEL, {"forget": {**BATCHES["forget"], **change}})
    assert not found
    assert says in packing.declined["packed rows"]
    assert not packing.as_dict()["used"]


def test_noise_and_factors_by_length_stay_as_they_are():
    model = make("llama")
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert "NEFTune" in together(model)[1].declined["packed rows"]
    assert "rotary" in together(make("dynamic", max_position_embeddings=8))[1].declined["packed rows"]


def test_the_backward_has_to_be_inside():
    with pytest.raises(RuntimeError, match="`with packing:` around the forward and its backward"):
        Packing().hidden(make("llama"), BATCHES, POSITIONS)


def test_a_model_that_says_otherwise_is_found_out(monkeypatch):
    """One that does not go by position_ids, one whose attention looks elsewhere: for good, not for a batch."""
    model, packing = make("llama"), Packing()
    monkeypatch.setattr(Tree, "inputs", property(lambda tree: {**INPUTS(tree), "position_ids": None}))
    assert not together(model, packing=packing)[0]
    assert "are others" in packing.declined["packed rows"]
    monkeypatch.undo()
    assert not together(model, packing=packing)[0]
    assert together(model)[0]


INPUTS = Tree.inputs.fget


def test_a_model_is_left_as_found():
    model = make("llama")
    with Packing() as packing:
        for _ in range(2):
            assert packing.hidden(model, BATCHES, POSITIONS)
        assert model.config._attn_implementation == "rows|sdpa"
    assert model.config._attn_implementation == "sdpa"
    with contextlib.suppress(KeyError), attending(CausalLM.of(model)):
        assert model.config._attn_implementation == "rows|sdpa"
        assert "rows|" not in str(model.config.to_dict())
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_without_rows_attention_is_the_models_own():
    model, batch = make("llama", attention="eager"), BATCHES["retain"]
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, written = model(**given).logits, model.generate(**given, max_new_tokens=3, do_sample=False)
    with attending(CausalLM.of(model)):
        assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), written)
        assert torch.equal(copy.deepcopy(model)(**given).logits, expected)


def test_gradients_of_copies():
    """gradcheck, twice: tokens of several rows, of one, and places of none."""
    tree = grow({"a": BATCHES["forget"]}, {"a": "supervised"}, share=True)
    rows: Rows = tree.rows
    count = tree.ids.numel()
    x = torch.randn(1, 2, count, 3, dtype=torch.float64, requires_grad=True)
    spread = rows.spread(x)
    assert torch.equal(spread[1, :, :5], x[0, :, rows.slots[1, :5]])
    lengths = torch.tensor([8, 5, 7])
    real = (torch.arange(8) < lengths[:, None])[:, None, :, None]  # at padding no gradient can come from
    assert torch.autograd.gradcheck(lambda x: rows.spread(x) * real, x)
    assert torch.autograd.gradgradcheck(lambda x: rows.spread(x) * real, x)
    y = torch.randn(*rows.slots.shape, 2, 3, dtype=torch.float64, requires_grad=True)
    assert rows.collect(rows.spread(x).transpose(1, 2)).equal(x.transpose(1, 2))
    assert torch.autograd.gradcheck(rows.collect, y)
    assert torch.autograd.gradgradcheck(rows.collect, y)
