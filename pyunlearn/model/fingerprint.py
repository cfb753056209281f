"""Which model and which data set: digests of everything that a number computed from them depends on."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from ..distributed import is_sharded, whole
from ..store import tensor_bytes
from .causal_lm import CausalLM


def model_fingerprint(model: nn.Module | CausalLM) -> str:
    """BLAKE2b (32 hex digits) over name, dtype, shape and bytes of every parameter and buffer, device aside.

    About a second per gigabyte and thread; tensors of an accelerator are copied to the host one at a time. Sharded ones
    (DTensors) are gathered one at a time: all ranks have to call it, and each has what one process would have.
    """
    alone = CausalLM.of(model).alone
    tensors = [*alone.named_parameters(), *alone.named_buffers()]

    def digest(entry: tuple[str, Tensor]) -> bytes:
        name, tensor = entry[0], whole(entry[1])
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        return hashlib.blake2b(header + hashlib.blake2b(tensor_bytes(tensor)).digest()).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sharded = any(is_sharded(tensor) for _, tensor in tensors)  # which ranks gather in one order
        return hashlib.blake2b(b"".join((map if sharded else pool.map)(digest, tensors)), digest_size=16).hexdigest()


def dataset_fingerprint(dataset: Any) -> str:
    """`dataset.fingerprint` where it has one, else BLAKE2b (32 hex digits) over its input_ids and labels."""
    known = getattr(dataset, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(dataset)):
        ids, labels = dataset[i]["input_ids"], dataset[i]["labels"]
        digest.update(len(ids).to_bytes(8, "little") + tensor_bytes(ids) + tensor_bytes(labels))
    return digest.hexdigest()
