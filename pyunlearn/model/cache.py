"""What a frozen reference model says about a data set, computed once and kept in a file instead of in memory.

The file is plain safetensors, readable by anything: per row of the data set the log-probabilities of its
supervised tokens, other numbers of theirs (entropy, or both at a temperature) and, for KL, the last hidden states
(H numbers a token instead of V) with the head that turns them into logits, or hidden states of other layers. It is
filled batch by batch without ever being held in memory, and read through a memory map. Its header holds a digest of
the tensors, which is checked when it is opened: what is not as it was written is never used.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .._files import one_at_a_time, write_file
from ..store import HEADER, UNREADABLE, Damaged, digest_json, read_header
from .cache_file import digest_file, fill, kind_of, measure, scalar_name
from .causal_lm import CausalLM
from .fingerprint import dataset_fingerprint, model_fingerprint
from .forward import PADDED, Layer, Positions, layer_number, number_of
from .head import Head

FORMAT = "pyunlearn-reference-2"
OLDER = '{"format": "pyunlearn-reference-1"'  # how the header of files from before there were digests begins
Scalar = tuple[str, float]  # output of `token_stats`, temperature
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
        lengths, counts = measure(dataset, positions)
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
        write_file(path, lambda new: fill(new, lm, dataset, identity, lengths, counts, batch_size, progress))
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
