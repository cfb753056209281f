"""A score depends on the sample alone: not on padding, the side it is on, or who else is in the batch."""

from __future__ import annotations

import pytest
import torch

from pyunlearn.model.forward import select_positions, supervised_hidden, supervised_stats
from pyunlearn.model.stats import token_stats_of

from .zoo import V, kinds, make

LENGTHS = [11, 7, 4, 9]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.15}  # eager attention's softmax is float32
KINDS = [(torch.float32, None), (torch.float32, "eager"), (torch.float64, None), (torch.float64, "eager"),
         (torch.bfloat16, None)]  # fmt: skip


def make_rows(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (length,), generator=generator) for length in lengths]


def pad(rows, side="right", more=0):
    """Every token of every row is supervised; `more` columns of padding on top of what the longest row needs."""
    length = max(map(len, rows)) + more
    ids, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], labels[i, place], mask[i, place] = row, row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logp(model, batch):
    return supervised_stats(model, batch)[0].logp


@pytest.mark.parametrize(
    ("name", "dtype", "attention"), kinds(*KINDS), ids=lambda value: str(value).removeprefix("torch.")
)
def test_a_batch_scores_each_row_as_alone(name, dtype, attention):
    model, rows = make(name, dtype, attention), make_rows(LENGTHS)
    expected = torch.cat([logp(model, pad([row])) for row in rows])
    assert len(expected) == sum(LENGTHS) - 4
    for batch in (pad(rows), pad(rows, "left"), pad(rows, "left", more=1), pad(rows[::-1], "left")):
        found = logp(model, batch)
        if batch["input_ids"][0, -1] == rows[3][-1]:
            found = torch.cat(found.split([length - 1 for length in LENGTHS[::-1]])[::-1])
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=0)


def test_nothing_is_scored_from_padding():
    batch = pad(make_rows([4, 2]), "left")
    rows, targets, sequence_ids = select_positions(batch)
    assert rows.tolist() == [0, 1, 2, 6]
    assert sequence_ids.tolist() == [0, 0, 0, 1]
    assert targets.tolist() == [*batch["input_ids"][0, 1:].tolist(), int(batch["input_ids"][1, 3])]
    batch["labels"][1, :2] = 5  # at padding
    assert torch.equal(select_positions(batch)[0], rows)
    cached = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])  # two tokens before these
    assert torch.equal(select_positions({**batch, "attention_mask": cached})[0], rows)
    with pytest.raises(
        ValueError, match=r"batch\['attention_mask'\]: needs the shape of input_ids \(2, 4\), got \(2, 3\)"
    ):
        select_positions({**batch, "attention_mask": batch["attention_mask"][:, 1:]})


def test_left_padding_keeps_the_order_of_every_kind_of_position():
    model, rows = make("gpt2"), make_rows([6, 3])
    left, right = pad(rows, "left"), pad(rows)
    with torch.no_grad():
        for positions in ("supervised", "real"):
            a, b = (supervised_hidden(model, batch, positions, layers=[1]) for batch in (left, right))
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-5, rtol=0)
            torch.testing.assert_close(a.layers[1], b.layers[1], atol=1e-5, rtol=0)
            assert torch.equal(a.targets, b.targets)
        everything = supervised_hidden(model, left, "all").hidden.view(2, 6, -1)
        real = left["attention_mask"] != 0
        torch.testing.assert_close(
            everything[real], supervised_hidden(model, right, "all").hidden.view(2, 6, -1)[right["attention_mask"] != 0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom", "mamba"])
def test_padding_that_counts_is_what_the_model_itself_says_of_it(name, dtype):
    """With the mask, in every dtype: without it padding looks at padding."""
    model, batch = make(name, dtype), pad(make_rows(LENGTHS))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        found = supervised_hidden(model, batch, "all").hidden.view(4, 11, -1)
        stats = token_stats_of(model, batch, "entropy", positions="followed")
    torch.testing.assert_close(found, expected.hidden_states[-1], atol=1e-5, rtol=0)
    belief = torch.distributions.Categorical(logits=expected.logits[:, :-1])
    torch.testing.assert_close(stats.entropy.double(), belief.entropy().double(), atol=1e-5, rtol=0)
    assert stats.mask.all()


def test_a_gap_in_the_mask_stays_one():
    model, batch = make("llama"), pad(make_rows([6, 5]), "left")
    batch["attention_mask"][:, 3] = 0
    with torch.no_grad():
        found = supervised_stats(model, batch, positions="real")[0].logp
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    places = [(0, 0), (0, 1), (0, 4), (1, 1), (1, 4)]
    expected = torch.stack([logits[b, t, batch["input_ids"][b, t + 1]] for b, t in places])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rotary_factors_of_a_batch_are_refused():
    model = make("longrope")  # changes beyond 12 tokens
    short, long = make_rows([7])[0], make_rows([14])[0]
    alone = torch.cat([logp(model, pad([short])), logp(model, pad([long]))])
    assert torch.equal(alone, torch.cat([logp(model, pad([short])), logp(model, pad([long, long]))[:13]]))
    for batch in (pad([short, long]), pad([short, long], "left"), pad([short], more=7)):
        with pytest.raises(ValueError, match=r"Phi3ForCausalLM: its rotary factors \(longrope\).* rows all above 12"):
            logp(model, batch)
    model = make("dynamic")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: its rotary factors \(dynamic\) .* at most 12 tokens"):
        logp(model, pad([long]))
