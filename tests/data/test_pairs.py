from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from pyunlearn.data import ForgetRetainDataset, QADataset, collate

REFUSALS = ["I do not know.", "No idea.", "Ask someone else.", "That is unknown to me."]
NEVER = "\N{BLACK SQUARE}" * 90


@pytest.fixture
def forget(world, tokenizer):
    return QADataset(world.forget[:10], tokenizer, 128)


@pytest.fixture
def retain(world, tokenizer):
    return QADataset(world.retain[:25], tokenizer, 128)


def epoch_of(pairs, epoch, kind="retain"):
    pairs.set_epoch(epoch)
    return [pairs[i][kind]["index"] for i in range(len(pairs))]


def refusals_of(pairs, epoch, role):
    pairs.set_epoch(epoch)
    decode = pairs.forget.prompt_format.tokenizer.decode
    rows = [pairs[i][f"{role}_refusal"] for i in range(len(pairs))]
    return [decode(row["labels"][row["labels"] != -100]).removesuffix("<eos>").strip() for row in rows]


def test_forget_alone(forget):
    pairs = ForgetRetainDataset(forget)
    assert len(pairs) == len(forget)
    assert set(pairs[3]) == {"forget"}
    assert pairs[3]["forget"]["input_ids"].equal(forget[3]["input_ids"])
    assert pairs[-1]["forget"]["index"] == len(forget) - 1
    with pytest.raises(IndexError, match="index 10 is out of range for 10 samples"):
        pairs[10]


def test_retain_pairing(forget, retain):
    pairs = ForgetRetainDataset(forget, retain, seed=3)
    assert epoch_of(pairs, 0, "forget") == list(range(10))
    epochs = [epoch_of(pairs, epoch) for epoch in range(5)]
    assert len(set(map(tuple, epochs))) == 5
    # 5 epochs of 10 are 2 shuffles of 25: every retain row comes up exactly twice
    stream = list(chain(*epochs))
    assert sorted(stream[:25]) == sorted(stream[25:]) == list(range(25))
    assert stream[:25] != list(range(25))
    assert [epoch_of(ForgetRetainDataset(forget, retain, seed=3), epoch) for epoch in range(5)] == epochs
    assert epoch_of(ForgetRetainDataset(forget, retain, seed=4), 0) != epochs[0]
    row = pairs[0]["retain"]
    assert row["input_ids"].equal(retain[row["index"]]["input_ids"])


def test_fewer_retain_rows_than_forget_rows(forget, retain, world, tokenizer):
    pairs = ForgetRetainDataset(forget, QADataset(world.retain[:4], tokenizer, 128))
    assert set(Counter(epoch_of(pairs, 0) + epoch_of(pairs, 1)).values()) == {5}


def test_refusals(forget, retain):
    pairs = ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("retain", "forget"), seed=1)
    item = pairs[2]
    assert list(item) == ["forget", "retain", "forget_refusal", "retain_refusal"]
    for role in ("forget", "retain"):
        row, refusal = item[role], item[f"{role}_refusal"]
        assert refusal["index"] == row["index"]
        prompt = int((row["labels"] == -100).sum())
        assert refusal["input_ids"][:prompt].equal(row["input_ids"][:prompt])
        assert (refusal["labels"][:prompt] == -100).all()
        drawn = [refusals_of(pairs, epoch, role) for epoch in range(3)]
        assert set(chain(*drawn)) == set(REFUSALS)
        assert drawn[0] != drawn[1]
        assert refusals_of(pairs, 0, role) == drawn[0]
    assert "retain_refusal" not in ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("forget",))[0]
    assert refusals_of(pairs, 0, "forget") != refusals_of(pairs, 0, "retain")


def test_fixed_refusals_can_be_cached(forget, retain, tokenizer):
    pairs = ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("forget", "retain"), fixed_refusals=True)
    for role, rows in (("forget", forget), ("retain", retain)):
        answers = [pairs.refusal(role, index) for index in range(len(rows))]
        cached = QADataset(rows.items, tokenizer, 128, answers=answers)
        for epoch in range(3):
            pairs.set_epoch(epoch)
            for index in range(len(pairs)):
                row = pairs[index][f"{role}_refusal"]
                assert row["input_ids"].equal(cached[row["index"]]["input_ids"])
                assert row["labels"].equal(cached[row["index"]]["labels"])


def test_collate(forget, retain):
    pairs = ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("forget",))
    items = [pairs[i] for i in (4, 0, 7)]
    batch = pairs.collate(items)
    assert set(batch) == {"forget", "retain", "forget_refusal"}
    assert batch["forget"]["index"].tolist() == batch["forget_refusal"]["index"].tolist() == [4, 0, 7]
    for kind, tensors in batch.items():
        for name, expected in collate([item[kind] for item in items], 0).items():
            assert tensors[name].equal(expected)
    with pytest.raises(ValueError, match="items is empty"):
        pairs.collate([])


def flatten(loader):
    return [{f"{kind}.{name}": t for kind, b in batch.items() for name, t in b.items()} for batch in loader]


@pytest.mark.parametrize("persistent", [False, True])
def test_same_whatever_the_workers(forget, retain, persistent):
    """set_epoch reaches workers that are already running, too."""
    pairs = ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("forget", "retain"), seed=2)
    alone = DataLoader(pairs, batch_size=4, collate_fn=pairs.collate)
    several = DataLoader(pairs, batch_size=4, collate_fn=pairs.collate, num_workers=2, persistent_workers=persistent)
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        for here, there in zip(flatten(alone), flatten(several), strict=True):
            assert here.keys() == there.keys()
            assert all(torch.equal(here[key], there[key]) for key in here)


def test_epoch(forget):
    pairs = ForgetRetainDataset(forget)
    assert pairs.epoch == 0
    pairs.set_epoch(7)
    assert pairs.epoch == 7
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        pairs.set_epoch(-1)


def test_errors(forget, retain):
    with pytest.raises(ValueError, match=r"refuse must name roles of .* got 'holdout'"):
        ForgetRetainDataset(forget, retain, refusals=REFUSALS, refuse=("holdout",))
    with pytest.raises(ValueError, match="refuse names 'retain', but retain is None"):
        ForgetRetainDataset(forget, refusals=REFUSALS, refuse=("retain",))
    with pytest.raises(ValueError, match=r"needs refusals, got None"):
        ForgetRetainDataset(forget, retain, refuse=("forget",))
    with pytest.raises(ValueError, match="made without refusals"):
        ForgetRetainDataset(forget, retain).refusal("forget", 0)


def test_long_refusal_is_found_at_once(forget, retain):
    with pytest.raises(ValueError, match=r"refusal '.*' to .* has \d+ tokens, more than the limit of 128"):
        ForgetRetainDataset(forget, retain, refusals=[*REFUSALS, NEVER], refuse=("forget",))
    assert len(ForgetRetainDataset(forget, retain, refusals=[*REFUSALS, NEVER])) == 10  # never asked for


def test_rows_and_refusals_fit_the_padding(forget, retain):
    longest = max(len(rows[i]["input_ids"]) for rows in (forget, retain) for i in range(len(rows)))
    pairs = ForgetRetainDataset(forget, retain, pad_to=longest)
    batch = pairs.collate([pairs[0], pairs[1]])
    assert batch["forget"]["input_ids"].shape == batch["retain"]["input_ids"].shape == (2, longest)
    with pytest.raises(ValueError, match=rf"pad_to={longest - 1}: needs at least the longest row's {longest} tokens"):
        ForgetRetainDataset(forget, retain, pad_to=longest - 1)
    with pytest.raises(ValueError, match=rf"more than the limit of {longest}; raise max_length \(or pad_to\)"):
        ForgetRetainDataset(forget, retain, pad_to=longest, refusals=["no " * 60], refuse=["forget"])


def rows_for(forget, count):
    return [{**forget[i], "index": i * count + j} for i in range(len(forget)) for j in range(count)]


def test_rows_that_go_together(forget, retain):
    """All of a question's are in its item, and in the batch one after another."""
    pairs = ForgetRetainDataset(forget, retain, together={"forget_sample": rows_for(forget, 3)})
    assert len(pairs) == len(forget)
    assert [row["index"] for row in pairs[4]["forget_sample"]] == [12, 13, 14]
    batch = pairs.collate([pairs[4], pairs[1]])
    assert batch["forget"]["index"].tolist() == [4, 1]
    assert batch["forget_sample"]["index"].tolist() == [12, 13, 14, 3, 4, 5]


def test_rows_that_go_apart(forget, retain):
    """An epoch pairs each of a question's with it once, beside as many rows of the retain stream."""
    pairs = ForgetRetainDataset(forget, retain, apart={"forget_alternate": rows_for(forget, 3)})
    assert len(pairs) == 3 * len(forget)
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        items = [pairs[i] for i in range(len(pairs))]
        seen = Counter((item["forget"]["index"], item["forget_alternate"]["index"]) for item in items)
        assert seen == Counter((i, 3 * i + j) for i in range(len(forget)) for j in range(3))
    retained = list(chain(*(epoch_of(pairs, epoch) for epoch in range(5))))
    assert set(Counter(retained).values()) == {3 * len(forget) * 5 // 25}
    drawn = [pairs.pair(2, place)["forget_alternate"]["index"] for place in range(0, 60, 10)]
    assert drawn == [6, 7, 8, 6, 7, 8]


@pytest.mark.parametrize("kind", ["together", "apart"])
@pytest.mark.parametrize("count", [0, 11])
def test_as_many_rows_of_every_question(forget, kind, count):
    with pytest.raises(ValueError, match=rf"forget_x: has {count} rows, needs as many of each of 10 forget questions"):
        ForgetRetainDataset(forget, **{kind: {"forget_x": rows_for(forget, 2)[:count]}})
