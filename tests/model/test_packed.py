"""Texts that share a row of the model are read as they are alone, or they do not share one."""

from __future__ import annotations

import logging

import peft
import pytest
import torch

from pyunlearn import _declined
from pyunlearn.metrics import Kept, read_rows
from pyunlearn.model import packed as packed_module
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.packed import by_prompt, pack, packed_length, reason_not_to_pack

from .zoo import ZOO, V, make

# what takes no positions, whose rotary factors depend on lengths, or that sees less than these texts
ALONE = {
    "mistral": "sliding_window",
    "gemma2": "sliding_window",
    "gemma3": "sliding_window",
    "bloom": "position_ids",
    "falcon": "",
    "mpt": "position_ids",
    "mamba": "position_ids",
    "rwkv": "position_ids",
}


def make_rows(seed=0, prompts=((7, 3), (5, 4), (6, 1)), unscored=(0, 0)):
    """Of each (length, texts), rows with one prompt. unscored: tokens within and after the scored ones."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length, texts in prompts:
        prompt = torch.randint(3, V, (length,), generator=draw)
        for _ in range(texts):
            rest = torch.randint(3, V, (int(torch.randint(2, 6, (), generator=draw)) + sum(unscored),), generator=draw)
            ids = torch.cat([prompt, rest])
            labels = ids.clone()
            labels[:length] = -100
            labels[length + 1 : length + 1 + unscored[0]] = -100
            labels[len(ids) - unscored[1] :] = -100
            rows.append({"input_ids": ids, "labels": labels, "index": len(rows)})
    return rows


def alone(model, rows, **options):
    return [read_rows(model, [row], progress=False, **options)[0] for row in rows]


class Tokens:
    """How many a model has been run on."""

    def __init__(self, model):
        self.count = 0
        self.hook = CausalLM.of(model).inner.get_input_embeddings().register_forward_hook(self.add)

    def add(self, layer, args, output):
        self.count += args[0].numel()


def ways():
    return [(name, way) for name in ZOO for way in ("eager", "sdpa") if way == "eager" or ZOO[name]()[0]._supports_sdpa]


@pytest.mark.parametrize(("name", "attention"), ways())
def test_they_are_read_as_alone(name, attention, caplog):
    model = make(name, attention=attention)
    rows, kept = make_rows(), Kept(None, model)
    _declined._logged.clear()
    with caplog.at_level(logging.INFO, "pyunlearn"):
        together = read_rows(model, rows, outputs=("entropy",), batch_size=8, kept=kept, progress=False)
    for one, other in zip(together, alone(model, rows, outputs=("entropy",)), strict=True):
        torch.testing.assert_close(one.logp, other.logp, atol=2e-4, rtol=0)
        torch.testing.assert_close(one.more["entropy"], other.more["entropy"], atol=2e-4, rtol=0)
    reason = kept.declined.get("shared prompts")
    if name in ALONE:
        assert ALONE[name] in reason
        assert f"shared prompts is not used: {reason}" in caplog.text
    else:
        assert reason is None


def test_a_prompt_goes_through_once(tmp_path):
    model, rows = make("llama"), make_rows(prompts=((9, 3), (9, 3)))
    read_rows(model, rows[:1], progress=False)  # proves the head
    tokens = Tokens(model)
    read_rows(model, rows, batch_size=6, kept=Kept(tmp_path, model), progress=False)
    packs = {9 + sum(len(row["input_ids"]) - 1 - 9 for row in own): own for own in (rows[:3], rows[3:])}
    ends = packs[max(packs)][0], packs[max(packs)][-1]
    trial = 2 * max(len(row["input_ids"]) for row in ends)
    assert tokens.count == 2 * max(packs) + max(packs) + trial
    assert 2 * max(packs) < 0.7 * sum(len(row["input_ids"]) for row in rows)
    tokens.count = 0
    read_rows(model, rows, batch_size=6, kept=Kept(tmp_path, model), progress=False)
    assert tokens.count == 0  # nor is anything tried


@pytest.mark.parametrize("unscored", [(1, 0), (0, 2), (2, 1)])
def test_tokens_that_are_not_scored_are_seen_and_not_told(unscored):
    model, rows = make("llama"), make_rows(unscored=unscored)
    kept = Kept(None, model)
    for one, other in zip(
        read_rows(model, rows, batch_size=8, kept=kept, progress=False), alone(model, rows), strict=True
    ):
        assert len(one.logp) == len(other.logp)
        torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)
    assert not kept.declined


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_a_prompt_may_have_more_texts_than_a_batch(batch_size):
    model, rows = make("gpt2"), make_rows(prompts=((6, 7), (4, 2)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [rows[i] for i in order]
    read = read_rows(model, mixed, batch_size=batch_size, progress=False)
    for one, other in zip(read, alone(model, mixed), strict=True):
        torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)
        assert torch.equal(one.greedy, other.greedy)


def test_groups_hold_at_most_a_batch():
    rows = make_rows(prompts=((4, 5), (3, 1)))
    assert by_prompt(rows, 2) == [[0, 1], [2, 3], [4], [5]]
    assert by_prompt(rows, 16) == [[0, 1, 2, 3, 4], [5]]


def test_a_row_has_no_more_tokens_than_its_mask_is_made_for(monkeypatch):
    """The square of 16 times a long text is no mask to have; parts of a prompt's texts may meet in a batch."""
    model, rows = make("llama"), make_rows(prompts=((7, 5), (5, 4), (6, 1)))
    whole, longest = [packed_length([rows[i] for i in group]) for group in by_prompt(rows, 16)], 16
    assert max(whole) > longest
    monkeypatch.setattr(packed_module, "LONGEST", longest)
    groups = by_prompt(rows, 16)
    assert max(packed_length([rows[i] for i in group]) for group in groups) <= longest
    assert len(whole) < len(groups) < len(rows)
    assert by_prompt(rows[:1], 16) == [[0]]  # which may be longer
    for batch_size in (4, 16):
        kept = Kept(None, model)
        read = read_rows(model, rows, batch_size=batch_size, kept=kept, progress=False)
        assert not kept.declined
        for one, other in zip(read, alone(model, rows), strict=True):
            torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)


def test_texts_that_share_nothing_get_no_mask_of_ours():
    model, masks = make("llama"), []
    rows = make_rows(prompts=((20, 1), (19, 1), (6, 3)))
    model.register_forward_pre_hook(
        lambda model, args, given: masks.append(given["attention_mask"].dim()), with_kwargs=True
    )
    read_rows(model, rows, batch_size=3, progress=False)
    assert sorted(masks[-2:]) == [2, 4]  # of the two alone, and of the three


@pytest.mark.parametrize(
    "texts",
    [
        [((3, 4, 5, 6, 7), (9, 10))] * 3,
        [((3, 4, 5, 6, 7), (9, 10, 11, 12)[:i]) for i in (1, 2, 3, 4)],
        [((3, 4, 5, 6), (9, 10)), ((3, 4, 5, 6, 9), (10,)), ((3, 4, 5, 6, 9), (10, 11)), ((3, 4, 5, 6), (11,))],
        [((3,), (9,)), ((3,), (10, 11)), ((), (3, 9, 10)), ((), (3, 9, 11))],
        [((0, 0, 1, 0), (0, 0)), ((0, 0, 1, 0), (2, 2)), ((0, 0, 1, 0), (1,))],
    ],
    ids=["the same", "prefixes", "prompts that go on as answers", "no prompt", "padding and end tokens"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom", "mamba"])
def test_odd_texts_are_read_as_alone(name, texts):
    model = make(name)
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in texts]
    labels = [torch.tensor([-100] * len(prompt) + [*answer]) for prompt, answer in texts]
    rows = [{"input_ids": own, "labels": label, "index": 0} for own, label in zip(ids, labels, strict=True)]
    for batch_size in (2, 16):
        read = read_rows(model, rows, batch_size=batch_size, progress=False)
        for one, other in zip(read, alone(model, rows), strict=True):
            torch.testing.assert_close(one.logp, other.logp, atol=2e-4, rtol=0)


def test_float64_models_share_too():
    model, rows = make("llama", torch.float64), make_rows()
    kept = Kept(None, model)
    read = read_rows(model, rows, batch_size=8, kept=kept, progress=False)
    assert not kept.declined
    for one, other in zip(read, alone(model, rows), strict=True):
        torch.testing.assert_close(one.logp, other.logp, atol=1e-6, rtol=0)


def test_adapters_share_too():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    rows, kept = make_rows(), Kept(None, model)
    read = read_rows(model, rows, kept=kept, progress=False)
    assert not kept.declined
    for one, other in zip(read, alone(model, rows), strict=True):
        torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_rotary_factors_of_longer_texts_are_their_own(name):
    model, rows = make(name), make_rows(prompts=((13, 2), (12, 1)))
    assert "rotary factors" in reason_not_to_pack(CausalLM.of(model), rows, [[0, 1], [2]])


@pytest.mark.parametrize(("prompts", "says"), [(((1, 2), (1, 1)), "under a tenth"), (((5, 1), (6, 1)), None)])
def test_it_is_not_shared_where_that_spares_little(prompts, says):
    """Where nothing is shared there is nothing to say."""
    model, rows = make("llama"), make_rows(prompts=prompts)
    kept = Kept(None, model)
    tokens = Tokens(model)
    read_rows(model, rows, kept=kept, progress=False)
    assert tokens.count >= sum(len(row["input_ids"]) for row in rows)
    assert (says is None and not kept.declined) or says in kept.declined["shared prompts"]


def test_a_window_that_all_texts_fit_in_changes_nothing():
    model, rows = make("mistral"), make_rows()
    model.config.sliding_window = 64
    kept = Kept(None, model)
    read = read_rows(model, rows, kept=kept, progress=False)
    assert not kept.declined
    for one, other in zip(read, alone(model, rows), strict=True):
        torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)


def test_padding_and_other_texts_are_not_seen():
    """Each text's numbers are the same bits whatever is packed behind it."""
    rows = make_rows()
    packed = pack([rows[:3], rows[3:7]], torch.float32)
    mask = packed.inputs["attention_mask"]
    assert mask.shape == (2, 1, packed.inputs["input_ids"].size(1), packed.inputs["input_ids"].size(1))
    seen = (mask[0, 0] == 0).nonzero()
    assert bool((seen[:, 1] <= seen[:, 0]).all())
    first, second = (len(row["input_ids"]) - 1 - 7 for row in rows[:2])
    start = 7 + first  # of the second text
    assert sorted(seen[seen[:, 0] == start][:, 1].tolist()) == [*range(7), start]
    assert packed.inputs["position_ids"][0, start : start + second].tolist() == [*range(7, 7 + second)]
