"""What a frozen reference model says about a data set, computed once and kept in a file instead of in memory.

The file is plain safetensors, readable by anything: per row of the data set the log-probabilities of its
supervised tokens, other numbers of theirs (entropy, or both at a temperature) and, for KL, the last hidden states
(H numbers a token instead of V) with the head that turns them into logits, or hidden states of other layers. It is
filled batch by batch without ever being held in memory, and read through a memory map. Its header holds a digest of
the tensors, which is checked when it is opened: what is not as it was written is never used.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .._files import one_at_a_time, write_file
from .._hints import check_known
from .._progress import track
from ..store import HEADER, UNREADABLE, Damaged, digest_json, digest_tensors, header_of, read_header, tensor_bytes
from .causal_lm import CausalLM, eval_mode
from .fingerprint import dataset_fingerprint, model_fingerprint
from .forward import (
    PADDED,
    Layer,
    Positions,
    check_finite,
    layer_number,
    length_batches,
    number_of,
    select_positions,
    supervised_hidden,
)
from .head import Head, head_stats

FORMAT = "pyunlearn-reference-2"
UNKNOWN = 32 * "0"  # in the place of a digest
OLDER = '{"format": "pyunlearn-reference-1"'  # how the header of files from before there were digests begins
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Scalar = tuple[str, float]  # output of `token_stats`, temperature
SCALARS = ("logp", "entropy")
logger = logging.getLogger(__name__)


class ReferenceCache:
    """The reference's per-token numbers for the rows of one data set; `build` it once, or `open` it.

    A dataset here is anything with `len` whose `[i]` gives {"input_ids", "labels"}, 1-d int64 tensors of one
    length (`pyunlearn.data.QADataset`, or a list of such rows).

    `len(cache)` is the number of rows, `cache.metadata` what the file says about itself: model and dataset
    (fingerprints), positions, kl, layers, scalars, depth, dtype, num_rows, num_tokens (of logp), num_hidden. Tensors
    come on the device of `indices` (the CPU for a list).
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises FileNotFoundError, ValueError for a file of another kind, Damaged for one that was changed."""
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no reference cache at {self.path}; make one with ReferenceCache.build")
        try:
            self._file = safe_open(str(self.path), framework="pt")
            header = (self._file.metadata() or {}).get(HEADER, "")
        except UNREADABLE as error:
            raise Damaged(self.path, f"no safetensors file: {error}") from error
        if header.startswith(OLDER):
            self.metadata: dict[str, Any] = json.loads(header)
            return
        self.metadata, digest = read_header(self.path) if header else ({}, "")
        if not str(self.metadata.get("format")).startswith("pyunlearn-reference-"):
            raise ValueError(f"{self.path} is not a reference cache but another safetensors file")
        if digest_file(self._file) != digest:
            raise Damaged(self.path, "its tensors do not have their digest")

    @classmethod
    def build(
        cls,
        model: nn.Module | CausalLM,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        kl: bool = False,
        layers: Iterable[Layer] = (),
        scalars: Iterable[Scalar] = (),
        positions: Positions = "supervised",
        batch_size: int = 8,
        progress: bool = True,
    ) -> ReferenceCache:
        """Runs the frozen `model` over `dataset` once and writes `path`; reuses a file there that fits.

        kl: keep last hidden states and the head too. layers: whose hidden states to keep too, as in
        `pyunlearn.model.forward.layer_number`. positions: of the hidden states, "supervised" (predicting a supervised
        token) or "real" (predicting any token of the row; prompts too). log-probabilities: of supervised tokens.
        scalars: what else to keep of these: pairs of "logp" or "entropy" and a temperature that divides the logits.

        A cache of another model, data set or kind is rebuilt, with a warning in the log that says why. The
        file appears under its name only when complete: an interrupted build leaves nothing. With several
        processes, build in one.
        Raises Damaged for a cache that was changed; ValueError for no rows, a row without supervised tokens, one whose
        "index" is not its place, a layer that the model does not have, non-finite log-probabilities, padded positions,
        or a `path` that holds something else; OSError if the disk is too full.
        """
        path = Path(path)
        if positions in PADDED:
            raise ValueError(
                f"positions={positions!r}: what a model says at padding depends on the batch, so it is not cached; "
                "use positions='real', or a live reference model"
            )
        if positions not in ("supervised", "real"):
            raise ValueError(f"positions={positions!r}: needs 'supervised' or 'real'")
        lengths, counts = _measure(dataset, positions)
        lm = CausalLM.of(model)
        identity = _identity(lm, dataset, kl, layers, positions, scalars)
        if path.exists():
            cache = cls(path)
            differing = cache._differing(identity)
            if not differing:
                logger.info("reusing the reference cache %s", path)
                return cache
            logger.warning("rebuilding the reference cache %s: its %s differ(s)", path, ", ".join(differing))
            del cache
        lm.check_head()
        write_file(path, lambda new: _fill(new, lm, dataset, identity, lengths, counts, batch_size, progress))
        return cls(path)

    @classmethod
    def shared(
        cls,
        model: nn.Module | CausalLM,
        dataset: Any,
        folder: str | os.PathLike[str],
        *,
        kl: bool = False,
        layers: Iterable[Layer] = (),
        scalars: Iterable[Scalar] = (),
        positions: Positions = "supervised",
        batch_size: int = 8,
        progress: bool = True,
    ) -> ReferenceCache:
        """`build` in a folder of caches named by what they are of, for trainings that share it: what several of them
        need at once, one builds and the others wait for. Raises as `build`.
        """
        layers, scalars = tuple(layers), tuple(scalars)
        identity = _identity(CausalLM.of(model), dataset, kl, layers, positions, scalars)
        path = Path(folder) / f"{digest_json({**identity, 'batch_size': batch_size})}.safetensors"
        with one_at_a_time(path):
            options: Any = {"kl": kl, "layers": layers, "scalars": scalars, "positions": positions}
            options["batch_size"] = batch_size
            return cls.build(model, dataset, path, **options, progress=progress)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], model: nn.Module | CausalLM | None = None, dataset: Any | None = None
    ) -> ReferenceCache:
        """Opens a built cache and, where given, checks that it is of this model and this data set.

        Raises FileNotFoundError, Damaged, or ValueError that says which of model and dataset differs.
        """
        cache = cls(path)
        identity = {"format": FORMAT}
        if model is not None:
            identity["model"] = model_fingerprint(model)
        if dataset is not None:
            identity["dataset"] = dataset_fingerprint(dataset)
        if differing := cache._differing(identity):
            details = "; ".join(
                f"{key} is {identity[key]}, the cache has {cache.metadata.get(key)}" for key in differing
            )
            raise ValueError(f"{cache.path} is a cache of another {' and '.join(differing)}: {details}")
        return cache

    def logp(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(N,) float32: log-probabilities of the supervised tokens of rows `indices`, row after row.

        The order is that of `supervised_hidden` on a batch of those rows. Raises IndexError for a row that is
        not in the cache.
        """
        return self._rows("logp", indices)

    def scalar(self, output: str, indices: Tensor | Sequence[int], temperature: float = 1.0) -> Tensor:
        """As `logp`: that, or "entropy", of logits / temperature. Raises ValueError if it was built without."""
        self.check_scalars([(output, temperature)])
        return self._rows(scalar_name(output, temperature), indices)

    def check_scalars(self, scalars: Iterable[Scalar]) -> None:
        """Raises ValueError that names those of `scalars` which it was built without."""
        has = {"logp", *self.metadata.get("scalars", ())}  # older files have no others
        if absent := sorted(each for each in scalars if scalar_name(*each) not in has):
            raise ValueError(f"{self.path} has {', '.join(sorted(has))} per token; build it with scalars={absent}")

    def hidden(self, indices: Tensor | Sequence[int], layer: Layer | None = None) -> Tensor:
        """(N, H) in the reference's dtype: hidden states at `metadata["positions"]`, in the same order.

        layer: one of `metadata["layers"]`, as in `layer_number`; None: the last hidden states, those that the head
        gets.
        Raises ValueError if the cache was built without kl=True or without that layer, IndexError for a row not in it.
        """
        if layer is None:
            self._needs_kl("hidden")
            return self._rows("hidden", indices)
        return self._rows(f"hidden.{self.find_layer(layer)}", indices)

    def find_layer(self, layer: Layer) -> Layer:
        """Its number. Raises ValueError if the cache has no hidden states of it."""
        layers, depth = self.metadata["layers"], self.metadata["depth"]
        number = number_of(layer, depth) if layers else layer
        if number not in layers:
            raise ValueError(
                f"{self.path} has hidden states of layers {layers}, not of layer {number}; "
                f"build it with layers=[{number!r}]"
            )
        return number

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
        layers = [f"layer {number}" for number in self.metadata["layers"]]
        contents = ", ".join(["logp", *self.metadata.get("scalars", ())] + ["hidden"] * self.metadata["kl"] + layers)
        tokens = self.metadata["num_tokens"]
        return f"ReferenceCache({str(self.path)!r}, rows={len(self)}, tokens={tokens}, {contents})"

    def _rows(self, name: str, indices: Tensor | Sequence[int]) -> Tensor:
        indices = torch.as_tensor(indices, dtype=torch.int64)
        rows = indices.cpu().reshape(-1)
        bad = rows[(rows < 0) | (rows >= len(self))]
        if bad.numel():
            raise IndexError(f"indices: row {int(bad[0])} is not in the cache, which has rows 0 to {len(self) - 1}")
        offsets = self._file.get_tensor(f"{kind_of(name)}.offsets")
        starts, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
        shift = starts - (counts.cumsum(0) - counts)
        places = torch.repeat_interleave(shift, counts) + torch.arange(int(counts.sum()))
        # The tensor is a view of the memory map: indexing it reads the rows asked for and copies them out.
        return self._file.get_tensor(name)[places].to(indices.device)

    def _needs_kl(self, what: str) -> None:
        if not self.metadata["kl"]:
            raise ValueError(f"{self.path} has log-probabilities only; build it with kl=True for {what}")

    def _differing(self, identity: Mapping[str, Any]) -> list[str]:
        """Names of what does not fit. A cache with hidden states also serves those who want none."""
        layers = set(identity.get("layers", ()))
        spared = {"layers", "scalars"}
        if identity.get("kl") is False:
            spared |= {"kl"} if layers else {"kl", "positions"}
        differing = [key for key, value in identity.items() if key not in spared and self.metadata.get(key) != value]
        return differing + [
            key for key in ("layers", "scalars") if not {*identity.get(key, ())} <= {*self.metadata.get(key, ())}
        ]


def scalar_name(output: str, temperature: float) -> str:
    """Of its tensor. Raises ValueError for another output, or a temperature that is not above 0."""
    check_known("scalars", output, SCALARS)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"scalars: temperature={temperature!r}: needs a finite number > 0")
    return output if temperature == 1 else f"{output}@{float(temperature)!r}"


def kind_of(name: str) -> str:
    """Whose offsets a tensor has: those of hidden states are all the same, and so are those of numbers per token."""
    return "hidden" if name.startswith("hidden") else "logp"


def _identity(
    lm: CausalLM, dataset: Any, kl: bool, layers: Iterable[Layer], positions: str, scalars: Iterable[Scalar]
) -> dict[str, Any]:
    """What a cache is of."""
    return {
        "format": FORMAT,
        "model": model_fingerprint(lm),
        "dataset": dataset_fingerprint(dataset),
        "kl": kl,
        "layers": sorted({layer_number(lm, layer) for layer in layers}),
        "scalars": sorted({scalar_name(*each) for each in scalars} - {"logp"}),
        "positions": positions,
    }


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
    header, starts = _make_header(layout, metadata, UNKNOWN)
    with path.open("wb") as file, eval_mode(lm.given):
        _make_room(path, len(header) + sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values()))
        file.write(header)

        def write(name: str, tensor: Tensor, row: int = 0) -> None:
            dtype, shape = layout[name]
            file.seek(starts[name] + row * prod(shape[1:]) * dtype.itemsize)
            file.write(tensor_bytes(tensor.to(dtype)))

        for name, tensor in tensors.items():
            write(name, tensor)
        for batch in track(length_batches(lengths, batch_size), "reference", progress):
            values = _read_batch(lm, head, [dataset[i] for i in batch], positions, layers, identity["scalars"])
            owners = torch.arange(len(batch)).repeat_interleave(torch.tensor([counts["logp"][i] for i in batch]))
            check_finite(values["logp"], owners.to(values["logp"].device), batch)
            for name in [name for name in values if name in layout]:
                kind = kind_of(name)  # row after row, as many of each kind as were counted
                for i, part in zip(batch, values[name].split([counts[kind][i] for i in batch]), strict=True):
                    write(name, part, int(offsets[kind][i]))
    with safe_open(str(path), framework="pt") as filled:
        digest = digest_file(filled)
    with path.open("r+b") as sealed:
        sealed.write(_make_header(layout, metadata, digest)[0])


def _read_batch(
    lm: CausalLM,
    head: Head,
    rows: Sequence[Mapping[str, Tensor]],
    positions: Positions,
    layers: Sequence[int],
    scalars: Sequence[str],
) -> dict[str, Tensor]:
    """What the model says of some rows, by tensor of the file."""
    inputs = _pad(rows)
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


def _make_header(layout: Layout, metadata: Mapping[str, Any], digest: str) -> tuple[bytes, dict[str, int]]:
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


def _make_room(path: Path, size: int) -> None:
    """Raises OSError if there is less than `size` bytes of it."""
    free = shutil.disk_usage(path.absolute().parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the reference cache needs {size:,} bytes, {free:,} are free", str(path))
    os.truncate(path, size)


def digest_file(file: Any) -> str:
    """`digest_tensors` of an open safetensors file, through its memory map."""
    return digest_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)


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
