import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.data import generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer

TEXTS = generate_authors(4, 10).texts
TOKENIZER = train_tokenizer(TEXTS, vocab_size=500)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def test_special_tokens():
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == 500
    ids = TOKENIZER("Who?").input_ids
    assert ids[0] == 1
    assert 2 not in ids


@given(st.text().filter(lambda text: "<" not in text))
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids) == text


def test_training_is_deterministic():
    again = train_tokenizer(TEXTS, vocab_size=500)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_save_and_load(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = type(TOKENIZER).from_pretrained(tmp_path)
    text = "Where was Ilse Sarnorova born?"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.pad_token_id == 0
    assert loaded.model_max_length == 256


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="texts is empty"):
        train_tokenizer([])
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 .* got 258"):
        train_tokenizer(TEXTS, vocab_size=258)


def test_model_is_a_function_of_its_arguments():
    first, again, other = (
        tiny_llama(TOKENIZER, 0, **SMALL),
        tiny_llama(TOKENIZER, seed=0, **SMALL),
        tiny_llama(TOKENIZER, 1, **SMALL),
    )
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert a.equal(b)
    assert not first.get_input_embeddings().weight.equal(other.get_input_embeddings().weight)


def test_model_ignores_and_keeps_global_state():
    expected = tiny_llama(500, **SMALL).state_dict()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny_llama(500, **SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_rng_state().equal(before)
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())


def test_model():
    model = tiny_llama(2048)
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.4e6
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.training
    config = tiny_llama(TOKENIZER, **SMALL).config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (500, 0, 1, 2)


def test_empty_vocabulary():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        tiny_llama(0)
