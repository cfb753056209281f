"""How a reference cache is laid out in its file, and how that is filled batch by batch."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .._hints import check_known
from .._progress import track
from ..store import digest_tensors, header_of, tensor_bytes
from .causal_lm import CausalLM, eval_mode
from .forward import Positions, check_finite, length_batches, select_positions, supervised_hidden
from .head import Head, head_stats

UNKNOWN = 32 * "0"  # in the place of a digest
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SCALARS = ("logp", "entropy")


def scalar_name(output: str, temperature: float) -> str:
    """Of its tensor. Raises ValueError for another output, or a temperature that is not above 0."""
    check_known("scalars", output, SCALARS)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"scalars: temperature={temperature!r}: needs a finite number > 0")
    return output if temperature == 1 else f"{output}@{float(temperature)!r}"


def kind_of(name: str) -> str:
    """Whose offsets a tensor has: those of hidden states are all the same, and so are those of numbers per token."""
    return "hidden" if name.startswith("hidden") else "logp"


def measure(dataset: Any, positions: str) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of every row; and how many of them get a log-probability and how many a hidden state."""
    lengths: list[int] = []
    counts: dict[str, list[int]] = {"logp": [], "hidden": []}
    for i in range(len(dataset)):
        row = dataset[i]
        ids, labels = row["input_ids"], row["labels"]
        if ids.dim() != 1 or ids.shape != labels.shape:
            raise ValueError(
                f"dataset[{i}]: input_ids and labels need one shape (T,), got {tuple(ids.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if (index := row.get("index", i)) != i:
            raise ValueError(f"dataset[{i}]: its 'index' is {index}, needs {i}, its place in the data set")
        supervised = int((labels[1:] != -100).sum())
        if supervised == 0:
            raise ValueError(f"dataset[{i}]: has no supervised token (label other than -100 after the first)")
        lengths.append(len(ids))
        counts["logp"].append(supervised)
        counts["hidden"].append(supervised if positions == "supervised" else len(ids) - 1)
    if not lengths:
        raise ValueError("dataset: is empty, needs at least one row")
    return lengths, counts


@torch.no_grad()
def fill(
    path: Path,
    lm: CausalLM,
    dataset: Any,
    identity: Mapping[str, Any],
    lengths: list[int],
    counts: dict[str, list[int]],
    batch_size: int,
    progress: bool,
) -> None:
    """Writes the whole file: header, offsets, head, every batch of rows at its place, and the digest of it all."""
    offsets = {name: torch.tensor([0, *counts[name]]).cumsum(0) for name in counts}
    head, layers = lm.read_head().merged(), identity["layers"]
    tensors = {"logp.offsets": offsets["logp"]}
    per_token = (torch.float32, (int(offsets["logp"][-1]),))
    layout: Layout = dict.fromkeys(["logp", *identity["scalars"]], per_token)
    wide = bool(identity["kl"] or layers)
    if wide:
        tensors["hidden.offsets"] = offsets["hidden"]
        states = (head.weight.dtype, (int(offsets["hidden"][-1]), head.weight.size(1)))
        layout |= {f"hidden.{layer}": states for layer in layers}
    if identity["kl"]:
        tensors["head.weight"] = head.weight
        tensors |= {} if head.bias is None else {"head.bias": head.bias}
        layout["hidden"] = states
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {
        **identity,
        "depth": lm.depth if layers else None,  # what has no number of blocks is cached all the same
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "num_rows": len(lengths),
        "num_tokens": int(offsets["logp"][-1]),
        "num_hidden": int(offsets["hidden"][-1]) if wide else 0,
        "head_bias": head.bias is not None,
        "softcap": head.softcap,
        "temperature": head.temperature,
    }
    positions: Positions = identity["positions"] if wide else "supervised"
    header, starts = make_header(layout, metadata, UNKNOWN)
    with path.open("wb") as file, eval_mode(lm.given):
        make_room(path, len(header) + sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values()))
        file.write(header)

        def write(name: str, tensor: Tensor, row: int = 0) -> None:
            dtype, shape = layout[name]
            file.seek(starts[name] + row * prod(shape[1:]) * dtype.itemsize)
            file.write(tensor_bytes(tensor.to(dtype)))

        for name, tensor in tensors.items():
            write(name, tensor)
        for batch in track(length_batches(lengths, batch_size), "reference", progress):
            values = read_batch(lm, head, [dataset[i] for i in batch], positions, layers, identity["scalars"])
            owners = torch.arange(len(batch)).repeat_interleave(torch.tensor([counts["logp"][i] for i in batch]))
            check_finite(values["logp"], owners.to(values["logp"].device), batch)
            for name in [name for name in values if name in layout]:
                kind = kind_of(name)  # row after row, as many of each kind as were counted
                for i, part in zip(batch, values[name].split([counts[kind][i] for i in batch]), strict=True):
                    write(name, part, int(offsets[kind][i]))
    with safe_open(str(path), framework="pt") as filled:
        digest = digest_file(filled)
    with path.open("r+b") as sealed:
        sealed.write(make_header(layout, metadata, digest)[0])


def read_batch(
    lm: CausalLM,
    head: Head,
    rows: Sequence[Mapping[str, Tensor]],
    positions: Positions,
    layers: Sequence[int],
    scalars: Sequence[str],
) -> dict[str, Tensor]:
    """What the model says of some rows, by tensor of the file."""
    inputs = pad(rows)
    supervised, targets, _ = select_positions(inputs)
    among = torch.isin(select_positions(inputs, positions)[0], supervised)
    moved = {name: value.to(lm.device) for name, value in inputs.items()}
    states = supervised_hidden(lm, moved, positions, layers=layers)
    hidden = states.hidden
    at_labels, targets = hidden[among.to(hidden.device)], targets.to(hidden.device)
    values = {"hidden": hidden} | {f"hidden.{layer}": states.layers[layer] for layer in layers}
    wanted: dict[float, list[str]] = {1.0: ["logp"]}  # by temperature
    for name in scalars:
        output, _, given = name.partition("@")
        wanted.setdefault(float(given or 1), []).append(output)
    for temperature, outputs in wanted.items():
        stats = head_stats(head, at_labels, targets, outputs, temperature=temperature).as_dict()
        values |= {scalar_name(output, temperature): stats[output] for output in outputs}
    return values


def make_header(layout: Layout, metadata: Mapping[str, Any], digest: str) -> tuple[bytes, dict[str, int]]:
    """A safetensors header (8 bytes of length, JSON), as long for every digest; and where each tensor starts."""
    header: dict[str, Any] = {"__metadata__": header_of(metadata, digest)}
    end = 0
    for name in sorted(layout, key=lambda name: -layout[name][0].itemsize):  # so that all are aligned
        dtype, shape = layout[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {
        name: 8 + len(text) + header[name]["data_offsets"][0] for name in layout
    }


def make_room(path: Path, size: int) -> None:
    """Raises OSError if there is less than `size` bytes of it."""
    free = shutil.disk_usage(path.absolute().parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the reference cache needs {size:,} bytes, {free:,} are free", str(path))
    os.truncate(path, size)


def digest_file(file: Any) -> str:
    """`digest_tensors` of an open safetensors file, through its memory map."""
    return digest_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)


def pad(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Right-padded batch; any id does for padding, which no real position of a causal model looks at."""

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": stack(ids, 0),
        "attention_mask": stack([torch.ones_like(i) for i in ids], 0),
        "labels": stack([row["labels"] for row in rows], -100),
    }
