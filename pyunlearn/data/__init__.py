"""Questions and answers: reading, tokenising, pairing, and an embedded fictitious world to practise on.

`pyunlearn.data.tiny` (tokenizer and model for the embedded world) imports transformers and is not loaded from here.
"""

from pyunlearn.data.authors import Author, World, generate_authors
from pyunlearn.data.authors_text import USUAL_REFUSALS
from pyunlearn.data.benchmarks import load_muse, load_safe, load_text, load_whp, load_wmdp
from pyunlearn.data.pairs import ForgetRetainDataset
from pyunlearn.data.prompt_format import Encoded, PlainFormat, PromptFormat, make_format
from pyunlearn.data.prompts import Prompt, make_prompt
from pyunlearn.data.qa import QA, check_disjoint, hold_out, load_qa, load_refusals
from pyunlearn.data.tokenise import QADataset, collate, padding_id

__all__ = [
    "QA",
    "USUAL_REFUSALS",
    "Author",
    "Encoded",
    "ForgetRetainDataset",
    "PlainFormat",
    "Prompt",
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
    "make_format",
    "make_prompt",
    "padding_id",
]
