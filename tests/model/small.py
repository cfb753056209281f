"""A small model, rows, and a cache of them."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from pyunlearn.model.cache import ReferenceCache

V, H = 53, 16


SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def make(seed=0, kind="llama"):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else PhiForCausalLM(PhiConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_rows(lengths=(9, 5, 12, 7, 9), seed=1):
    """Rows whose first third (at least one token) is prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(1, V, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        rows.append({"input_ids": ids, "labels": labels, "index": index})
    return rows


def build(model, rows, path, **options):
    return ReferenceCache.build(model, rows, path, progress=False, **options)


def spoil(path, whole):
    """Writes NaN over all rows of tensors but those from a first to a last; the file stays the same one."""
    with path.open("r+b") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        for name, (first, last) in whole.items():
            begin, end = (8 + header_size + offset for offset in header[name]["data_offsets"])
            size = (end - begin) // header[name]["shape"][0]
            for start, stop in ((begin, begin + first * size), (begin + last * size, end)):
                file.seek(start)
                file.write(b"\xff" * (stop - start))
