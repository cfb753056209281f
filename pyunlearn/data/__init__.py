"""Questions and answers: reading, tokenising, pairing, and an embedded fictitious world to practise on.

`pyunlearn.data.tiny` (tokenizer and model for the embedded world) imports transformers and is not loaded from here.
"""

from pyunlearn.data.authors import Author, World, generate_authors
from pyunlearn.data.benchmarks import load_muse, load_safe, load_text, load_whp, load_wmdp
from pyunlearn.data.pairs import ForgetRetainDataset
from pyunlearn.data.qa import QA, check_disjoint, hold_out, load_qa, load_refusals
from pyunlearn.data.tokenise import (
    Encoded,
    PlainFormat,
    PromptFormat,
    QADataset,
    collate,
    padding_id,
)

__all__ = [
    "QA",
    "Author",
    "Encoded",
    "ForgetRetainDataset",
    "PlainFormat",
    "PromptFormat",
    "QADataset",
    "World",
    "check_disjoint",
    "collate",
    "generate_authors",
    "hold_out",
    "load_muse",
    "load_qa",
    "load_refusals",
    "load_safe",
    "load_text",
    "load_whp",
    "load_wmdp",
    "padding_id",
]
