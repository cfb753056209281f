"""A tokenizer and a Llama small enough to learn the embedded world by heart on a laptop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048, max_length: int = 256) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Decoding gives any text back exactly. Ids: 0 pad, 1 BOS (put before every text), 2 EOS, then the 256 bytes, then
    merges. Texts with few distinct words may give fewer than vocab_size tokens. max_length: its model_max_length.

    Raises ValueError for no texts or a vocab_size without room for the bytes and the special tokens.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("texts is empty: a tokenizer needs text to train on")
    special = [PAD, BOS, EOS]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size must be at least {256 + len(special)} (bytes and special tokens), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


SIZES = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}  # unless told


def tiny_llama(tokenizer: PreTrainedTokenizerBase | int, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama (float32, CPU), a function of its arguments; global random state stays as it is.

    tokenizer: the tokenizer to serve, or a vocabulary size. config: LlamaConfig fields in place of the defaults.
    With 2,048 tokens the defaults make 1.3 million parameters (embeddings tied to the head), which learn the 400
    pairs of `generate_authors()` by heart in 16 epochs (AdamW at 2e-3, batches of 16, cosine schedule).

    Raises ValueError for an empty vocabulary.
    """
    vocab_size = tokenizer if isinstance(tokenizer, int) else len(tokenizer)
    if vocab_size < 1:
        raise ValueError(f"the vocabulary needs at least one token, got {vocab_size}")
    fields = {
        "vocab_size": vocab_size,
        **SIZES,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # at this width it learns twice as fast as from the usual 0.02
    }
    if not isinstance(tokenizer, int):
        fields |= {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "bos", "eos")}
    # The CPU generator alone is saved and seeded: torch.manual_seed would reach the accelerators' as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(fields | config)), dtype=torch.float32)
    return model.eval()
