"""Teacher-forced metrics against brute force, by hand, and on a model against its own logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertLMHeadModel

from pyunlearn.data.tiny import tiny_llama
from pyunlearn.metrics import extraction_strength, memorization_accuracy, probability, teacher_forced


def flat(sequences):
    """Lists of bools -> (greedy (N,), sequence_ids (N,), number of sequences)."""
    ids = [i for i, sequence in enumerate(sequences) for _ in sequence]
    return (
        torch.tensor([hit for sequence in sequences for hit in sequence]),
        torch.tensor(ids),
        len(sequences),
    )


def brute_force_strength(hits, variant):
    """The definition, word by word: try every prefix length k from short to long."""
    if variant == "open_unlearning":
        hits = hits[:-1]
    n = len(hits)
    if n == 0:
        return 0.0
    longest = n if variant == "suffix" else n - 1
    k = next((k for k in range(longest) if all(hits[k:])), longest)
    return 1 - k / n


@pytest.mark.parametrize("variant", ["suffix", "open_unlearning"])
@given(sequences=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_extraction_strength_equals_brute_force(variant, sequences):
    ours = extraction_strength(*flat(sequences), variant)
    expected = [brute_force_strength(sequence, variant) for sequence in sequences]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("variant", ["suffix", "open_unlearning"])
@given(sequences=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_memorization_accuracy_equals_brute_force(variant, sequences):
    counted = [sequence if variant == "suffix" else sequence[:-1] for sequence in sequences]
    expected = [sum(sequence) / len(sequence) if sequence else math.nan for sequence in counted]
    found = memorization_accuracy(*flat(sequences), variant).tolist()
    assert found == pytest.approx(expected, abs=1e-15, nan_ok=True)


def test_extraction_strength_by_hand():
    sequences = [
        [True] * 4,
        [False] * 4,
        [True, False, True, True],
        [True, True, True, False],
        [False],
        [True],
    ]
    assert extraction_strength(*flat(sequences)).tolist() == [1, 0, 0.5, 0, 0, 1]
    theirs = extraction_strength(*flat(sequences), "open_unlearning").tolist()
    assert theirs == pytest.approx([1, 1 / 3, 1 / 3, 1, 0, 0])  # the last token is left out


def test_open_unlearning_leaves_the_last_supervised_token_out():
    """A sentence known by heart whose end token is not."""
    sequence = flat([[True, True, True, True, False]])
    assert extraction_strength(*sequence, "open_unlearning").item() == 1.0
    assert memorization_accuracy(*sequence, "open_unlearning").item() == 1.0
    assert extraction_strength(*sequence).item() == 0.0
    assert memorization_accuracy(*sequence).item() == 0.8


def test_probability_by_hand():
    """Tokens of probability 1/2, 1/4 and 1/8: geometric mean 1/4."""
    nll = -torch.tensor([0.5, 0.25, 0.125]).log().sum()
    torch.testing.assert_close(probability(nll[None], torch.tensor([3])), torch.tensor([0.25], dtype=torch.float64))
    assert probability(torch.zeros(2), torch.tensor([1, 7])).tolist() == [1, 1]


def test_bad_vectors():
    greedy, ids = torch.tensor([True, False]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        extraction_strength(greedy, ids, 3)
    with pytest.raises(ValueError, match="below num_sequences=2, got 2"):
        memorization_accuracy(greedy, ids, 2)
    with pytest.raises(ValueError, match=r"tokens of sequence 0 first, .* out of order"):
        extraction_strength(torch.tensor([True, False, True]), torch.tensor([0, 1, 0]), 2)
    with pytest.raises(ValueError, match="variant='generation'"):
        extraction_strength(greedy, torch.tensor([0, 0]), 1, "generation")


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(40, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # tied to the head: peaked enough for some tokens to be right
    return model


def make_rows(model, lengths):
    """Rows the model writes itself, greedily, after a first token; every second one has a token changed."""
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.tensor([[index + 1]])
        for _ in range(length - 1):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        ids = ids[0]
        if index % 2:
            ids[length // 2] = (ids[length // 2] + 1) % 40
        labels = ids.clone()
        labels[: 1 + index % 3] = -100
        rows.append({"input_ids": ids, "labels": labels, "index": index})
    return rows


def test_one_pass_equals_the_models_logits_in_the_original_order(model):
    rows = make_rows(model, [7, 12, 4, 9, 12])
    records = teacher_forced(model, rows, batch_size=2, progress=False)
    strengths = []
    for row, record in zip(rows, records, strict=True):
        with torch.no_grad():
            logp = model(row["input_ids"][None]).logits[0, :-1].double().log_softmax(-1)
        keep = row["labels"][1:] != -100
        logp, targets = logp[keep], row["labels"][1:][keep]
        nll = -logp.gather(1, targets[:, None]).sum().item()
        hits = (logp.argmax(-1) == targets).tolist()
        assert record["num_tokens"] == len(targets)
        assert record["nll"] == pytest.approx(nll, abs=1e-4)
        assert record["probability"] == pytest.approx(torch.tensor(-nll / len(targets)).exp().item(), abs=1e-5)
        assert record["memorization_accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert record["extraction_strength"] == pytest.approx(brute_force_strength(hits, "suffix"))
        strengths.append(record["extraction_strength"])
    assert strengths[0] == strengths[2] == strengths[4] == 1  # the rows that were left as the model wrote them
    assert 0 < min(strengths[1], strengths[3]) < 1


def test_a_metric_without_a_value_is_left_out(model):
    rows = make_rows(model, [7, 3])
    rows[1]["labels"][:-1] = -100
    whole, single = teacher_forced(model, rows, variant="open_unlearning", progress=False)
    assert whole["memorization_accuracy"] == whole["extraction_strength"] == 1.0
    assert "memorization_accuracy" not in single
    assert single["extraction_strength"] == 0.0


@pytest.fixture(scope="module")
def rows(model):
    return make_rows(model, [7, 12, 4, 9, 12, 5])


@pytest.fixture(scope="module")
def alone(model, rows):
    """Of every row by itself, by variant."""
    return {
        variant: [teacher_forced(model, [row], variant=variant, progress=False)[0] for row in rows]
        for variant in ("suffix", "open_unlearning")
    }


@settings(max_examples=25)
@given(
    order=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    batch_size=st.integers(1, 10),
    variant=st.sampled_from(["suffix", "open_unlearning"]),
)
def test_batch_mates_order_and_padding_do_not_change_a_score(model, rows, alone, order, batch_size, variant):
    chosen = [rows[i] for i in order]
    records = teacher_forced(model, chosen, batch_size=batch_size, variant=variant, progress=False)
    for i, record in zip(order, records, strict=True):
        assert record == pytest.approx(alone[variant][i], rel=1e-5)


def test_the_model_is_left_as_it_was(model):
    model.train()
    teacher_forced(model, make_rows(model, [5]), progress=False)
    assert all(module.training for module in model.modules())
    model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_datasets(model):
    with pytest.raises(ValueError, match="dataset: is empty"):
        teacher_forced(model, [])
    rows = make_rows(model, [5, 5])
    rows[1]["labels"] = torch.full((5,), -100)
    with pytest.raises(ValueError, match=r"dataset\[1\]: has no supervised token"):
        teacher_forced(model, rows)


def test_a_model_that_looks_ahead_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(vocab_size=40, **sizes))
    with pytest.raises(TypeError, match="BertLMHeadModel: its BertConfig is an encoder"):
        teacher_forced(model, make_rows(model, [5, 6]), progress=False)


def test_a_model_that_diverged():
    broken = tiny_llama(40, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = torch.nan
    ids = [torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])]
    rows = [{"input_ids": i, "labels": i, "index": 0} for i in ids]
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[0, 1\]"):  # tied: the head too
        teacher_forced(broken, rows, progress=False)
    broken.lm_head = torch.nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[1\]"):
        teacher_forced(broken, rows, progress=False)
    with torch.no_grad():
        broken.lm_head.bias[5] = torch.inf  # all else would be forgotten: -inf
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[0\]"):
        teacher_forced(broken, rows[:1], progress=False)


def test_progress_bar(model, capsys):
    teacher_forced(model, make_rows(model, [5, 6, 4]), batch_size=2)
    assert "3/3" in capsys.readouterr().err
