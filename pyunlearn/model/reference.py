"""What a frozen reference model says about a data set, computed once and kept in a file instead of in memory.

The file is plain safetensors, readable by anything: per row of the data set the log-probabilities of its
supervised tokens and, for KL, the last hidden states (H numbers a token instead of V) with the head that
turns them into logits, or hidden states of other layers. It is filled batch by batch without ever being held
in memory, and read through a memory map.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._progress import track
from .forward import Layer, Positions, layer_number, length_batches, select_positions, supervised_hidden
from .head import Head, check_output_head, eval_mode, head_stats, model_device, output_head, unwrap

FORMAT = "pyunlearn-reference-1"
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
logger = logging.getLogger(__name__)


class ReferenceCache:
    """The reference's per-token numbers for the rows of one data set; `build` it once, or `open` it.

    A dataset here is anything with `len` whose `[i]` gives {"input_ids", "labels"}, 1-d int64 tensors of one
    length (`pyunlearn.data.QADataset`, or a list of such rows).

    `len(cache)` is the number of rows, `cache.metadata` what the file says about itself: model and dataset
    (fingerprints), positions, kl, layers, dtype, num_rows, num_tokens (of logp), num_hidden. Tensors come on the
    device of `indices` (the CPU for a list).
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no reference cache at {self.path}; make one with ReferenceCache.build")
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a reference cache: no safetensors file ({error})") from error
        self.metadata: dict[str, Any] = json.loads((self._file.metadata() or {}).get("pyunlearn", "{}"))
        if not str(self.metadata.get("format")).startswith("pyunlearn-reference-"):
            raise ValueError(f"{self.path} is not a reference cache but another safetensors file")
        self.metadata.setdefault("layers", [])  # files of before there were any

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        kl: bool = False,
        layers: Iterable[Layer] = (),
        positions: Positions = "supervised",
        batch_size: int = 8,
        progress: bool = True,
    ) -> ReferenceCache:
        """Runs the frozen `model` over `dataset` once and writes `path`; reuses a file there that fits.

        kl: keep last hidden states and the head too. layers: whose hidden states to keep too, as in
        `pyunlearn.model.forward.layer_number`. positions: of the hidden states, "supervised" (predicting a supervised
        token) or "real" (predicting any token of the row; prompts too). log-probabilities: of supervised tokens.

        A cache of another model, data set or kind is rebuilt, with a warning in the log that says why. The
        file appears under its name only when complete: an interrupted build leaves nothing. With several
        processes, build in one.
        Raises ValueError for no rows, a row without supervised tokens, one whose "index" is not its place, a layer
        that the model does not have, non-finite log-probabilities, positions="all", or a `path` that holds something
        else; OSError if the disk is too full.
        """
        path = Path(path)
        if positions in ("followed", "all"):
            raise ValueError(
                f"positions={positions!r}: what a model says at padding depends on the batch, so it is not cached; "
                "use positions='real', or a live reference model"
            )
        if positions not in ("supervised", "real"):
            raise ValueError(f"positions={positions!r}: needs 'supervised' or 'real'")
        lengths, counts = _measure(dataset, positions)
        wanted = {
            "format": FORMAT,
            "model": model_fingerprint(model),
            "dataset": dataset_fingerprint(dataset),
            "kl": kl,
            "layers": sorted({layer_number(model, layer) for layer in layers}),
            "positions": positions,
        }
        if path.exists():
            cache = cls(path)
            differing = cache._differing(wanted)
            if not differing:
                logger.info("reusing the reference cache %s", path)
                return cache
            logger.warning("rebuilding the reference cache %s: its %s differ(s)", path, ", ".join(differing))
            del cache
        check_output_head(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                _fill(file, model, dataset, wanted, lengths, counts, batch_size, progress)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return cls(path)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None, dataset: Any | None = None
    ) -> ReferenceCache:
        """Opens a built cache and, where given, checks that it is of this model and this data set.

        Raises FileNotFoundError, or ValueError that says which of model and dataset differs.
        """
        cache = cls(path)
        wanted = {"format": FORMAT}
        if model is not None:
            wanted["model"] = model_fingerprint(model)
        if dataset is not None:
            wanted["dataset"] = dataset_fingerprint(dataset)
        if differing := cache._differing(wanted):
            details = "; ".join(f"{key} is {wanted[key]}, the cache has {cache.metadata.get(key)}" for key in differing)
            raise ValueError(f"{cache.path} is a cache of another {' and '.join(differing)}: {details}")
        return cache

    def logp(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(N,) float32: log-probabilities of the supervised tokens of rows `indices`, row after row.

        The order is that of `supervised_hidden` on a batch of those rows. Raises IndexError for a row that is
        not in the cache.
        """
        return self._rows("logp", indices)

    def hidden(self, indices: Tensor | Sequence[int], layer: int | None = None) -> Tensor:
        """(N, H) in the reference's dtype: hidden states at `metadata["positions"]`, in the same order.

        layer: one of `metadata["layers"]`; None: the last hidden states, those that the head gets.
        Raises ValueError if the cache was built without kl=True or without that layer, IndexError for a row not in it.
        """
        if layer is None:
            self._needs_kl("hidden")
            return self._rows("hidden", indices)
        if layer not in self.metadata["layers"]:
            raise ValueError(
                f"{self.path} has hidden states of layers {self.metadata.get('layers', [])}, not of layer {layer}; "
                f"build it with layers=[{layer}]"
            )
        return self._rows(f"hidden.{layer}", indices)

    @property
    def head(self) -> Head:
        """The reference's head, memory-mapped on the CPU: move it to the device once, not in every step.

        Raises ValueError if the cache was built without kl=True.
        """
        self._needs_kl("head")
        bias = self._file.get_tensor("head.bias") if self.metadata["head_bias"] else None
        softcap, temperature = self.metadata["softcap"], self.metadata["temperature"]
        return Head(self._file.get_tensor("head.weight"), bias, softcap, temperature)

    def __len__(self) -> int:
        return self.metadata["num_rows"]

    def __repr__(self) -> str:
        kept = ", ".join(["logp"] + ["hidden"] * self.metadata["kl"] + [f"layer {n}" for n in self.metadata["layers"]])
        tokens = self.metadata["num_tokens"]
        return f"ReferenceCache({str(self.path)!r}, rows={len(self)}, tokens={tokens}, {kept})"

    def _rows(self, name: str, indices: Tensor | Sequence[int]) -> Tensor:
        asked = torch.as_tensor(indices, dtype=torch.int64)
        rows = asked.cpu().reshape(-1)
        bad = rows[(rows < 0) | (rows >= len(self))]
        if bad.numel():
            raise IndexError(f"indices: row {int(bad[0])} is not in the cache, which has rows 0 to {len(self) - 1}")
        offsets = self._file.get_tensor(f"{name.partition('.')[0]}.offsets")  # those of all hidden states are the same
        starts, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
        shift = starts - (counts.cumsum(0) - counts)
        places = torch.repeat_interleave(shift, counts) + torch.arange(int(counts.sum()))
        # The tensor is a view of the memory map: indexing it reads the rows asked for and copies them out.
        return self._file.get_tensor(name)[places].to(asked.device)

    def _needs_kl(self, what: str) -> None:
        if not self.metadata["kl"]:
            raise ValueError(f"{self.path} has log-probabilities only; build it with kl=True for {what}")

    def _differing(self, wanted: Mapping[str, Any]) -> list[str]:
        """Names of what does not fit. A cache with hidden states also serves those who want none."""
        layers = set(wanted.get("layers", ()))
        spared = {"layers"}
        if wanted.get("kl") is False:
            spared |= {"kl"} if layers else {"kl", "positions"}
        differing = [key for key, value in wanted.items() if key not in spared and self.metadata.get(key) != value]
        return differing + ["layers"] * (not layers <= set(self.metadata["layers"]))


def model_fingerprint(model: nn.Module) -> str:
    """BLAKE2b (32 hex digits) over name, dtype, shape and bytes of every parameter and buffer, device aside.

    About a second per gigabyte and thread; tensors of an accelerator are copied to the host one at a time.
    """
    inner = unwrap(model)
    tensors = [*inner.named_parameters(), *inner.named_buffers()]

    def digest(entry: tuple[str, Tensor]) -> bytes:
        name, tensor = entry
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        return hashlib.blake2b(header + hashlib.blake2b(_bytes(tensor)).digest()).digest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return hashlib.blake2b(b"".join(pool.map(digest, tensors)), digest_size=16).hexdigest()


def dataset_fingerprint(dataset: Any) -> str:
    """`dataset.fingerprint` where it has one, else BLAKE2b (32 hex digits) over its input_ids and labels."""
    known = getattr(dataset, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(dataset)):
        ids, labels = dataset[i]["input_ids"], dataset[i]["labels"]
        digest.update(len(ids).to_bytes(8, "little") + _bytes(ids) + _bytes(labels))
    return digest.hexdigest()


def _measure(dataset: Any, positions: str) -> tuple[list[int], dict[str, list[int]]]:
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
def _fill(
    file: BinaryIO,
    model: nn.Module,
    dataset: Any,
    key: Mapping[str, Any],
    lengths: list[int],
    counts: dict[str, list[int]],
    batch_size: int,
    progress: bool,
) -> None:
    """Writes the whole file: header, offsets, head, then every batch of rows at its place."""
    offsets = {name: torch.tensor([0, *counts[name]]).cumsum(0) for name in counts}
    head, device = output_head(model).merged(), model_device(model)
    tensors = {"logp.offsets": offsets["logp"]}
    layout: Layout = {"logp": (torch.float32, (int(offsets["logp"][-1]),))}
    layers, wide = key["layers"], bool(key["kl"] or key["layers"])
    if wide:
        tensors["hidden.offsets"] = offsets["hidden"]
        states = (head.weight.dtype, (int(offsets["hidden"][-1]), head.weight.size(1)))
        layout |= {f"hidden.{layer}": states for layer in layers}
    if key["kl"]:
        tensors["head.weight"] = head.weight
        tensors |= {} if head.bias is None else {"head.bias": head.bias}
        layout["hidden"] = states
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {
        **key,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "num_rows": len(lengths),
        "num_tokens": int(offsets["logp"][-1]),
        "num_hidden": int(offsets["hidden"][-1]) if wide else 0,
        "head_bias": head.bias is not None,
        "softcap": head.softcap,
        "temperature": head.temperature,
    }
    starts = _write_header(file, layout, metadata)
    positions: Positions = key["positions"] if wide else "supervised"

    def write(name: str, tensor: Tensor, row: int = 0) -> None:
        dtype, shape = layout[name]
        file.seek(starts[name] + row * prod(shape[1:]) * dtype.itemsize)
        file.write(_bytes(tensor.to(dtype)))

    for name, tensor in tensors.items():
        write(name, tensor)
    with eval_mode(model):
        for batch in track(length_batches(lengths, batch_size), "reference", progress):
            inputs = _pad([dataset[i] for i in batch])
            rows, targets, _ = select_positions(inputs)
            among = torch.isin(select_positions(inputs, positions)[0], rows)
            moved = {name: value.to(device) for name, value in inputs.items()}
            found = supervised_hidden(model, moved, positions, layers=layers)
            hidden = found.hidden
            logp = head_stats(head, hidden[among.to(hidden.device)], targets.to(hidden.device)).logp
            if not bool(logp.isfinite().all()):
                raise ValueError(f"model: non-finite log-probabilities among rows {sorted(batch)}")
            kept = {"logp": logp, "hidden": hidden} | {f"hidden.{layer}": found.layers[layer] for layer in layers}
            for name, values in kept.items():
                if name in layout:  # row after row, as many of each as were counted
                    kind = name.partition(".")[0]
                    for i, part in zip(batch, values.split([counts[kind][i] for i in batch]), strict=True):
                        write(name, part, int(offsets[kind][i]))


def _write_header(file: BinaryIO, layout: Layout, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Writes a safetensors header (8 bytes of length, JSON), makes room; returns where each tensor starts."""
    header: dict[str, Any] = {"__metadata__": {"pyunlearn": json.dumps(metadata)}}
    end = 0
    for name in sorted(layout, key=lambda name: -layout[name][0].itemsize):  # so that all are aligned
        dtype, shape = layout[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(file.name))).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the reference cache needs {size:,} bytes, {free:,} are free", file.name)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(size)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in layout}


def _pad(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Right-padded batch; any id does for padding, which no real position of a causal model looks at."""

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": stack(ids, 0),
        "attention_mask": stack([torch.ones_like(i) for i in ids], 0),
        "labels": stack([row["labels"] for row in rows], -100),
    }


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a buffer, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
