"""What a model makes of texts that it is given (`read_rows`), batch by batch, each kept as soon as it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import collate
from ..distributed import Processes
from ..model.causal_lm import CausalLM, eval_mode
from ..model.fingerprint import dataset_fingerprint, model_fingerprint
from ..model.forward import check_finite, length_batches, token_stats_of
from ..store import Store, digest_json

FORMAT = 1  # of what is kept: a later one does not read an earlier one's
BASE = ("logp", "greedy")


@dataclass(frozen=True)
class Reading:
    """One text as a model reads it: tensors (n,) on the CPU, over its supervised tokens in reading order.

    logp: log-probabilities in nats, float32 (float64 of a float64 model). greedy: bool, whether the token is the most
    likely one. more: further outputs of `token_stats` by name, e.g. entropy, variance.
    """

    logp: Tensor
    greedy: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.logp)

    @property
    def nll(self) -> float:
        """Summed over the tokens, in nats."""
        return float(-self.logp.double().sum())

    @property
    def loss(self) -> float:
        """nll / num_tokens: the mean over the tokens, in nats."""
        return self.nll / self.num_tokens


class Kept:
    """What one model has read and written, a unit a batch: a kill loses the batch at work, no more.

    folder: where they are kept, in a folder for each model; None is in memory alone. A unit is read back only for the
    same weights, configuration, kind of attention, token ids and settings, whoever made it, so that one folder serves
    any number of runs at once; it may be deleted at any time.
    """

    def __init__(self, folder: str | Path | None, model: nn.Module | CausalLM):
        self.store = Store(None)
        if folder is not None:
            lm = CausalLM.of(model)
            config = {key: value for key, value in lm.config.to_dict().items() if key not in NOT_COMPARED}
            kind = {"attention": getattr(lm.config, "_attn_implementation", None), "config": digest_json(config)}
            self.store = Store(Path(folder) / digest_json({"format": FORMAT, "model": model_fingerprint(lm), **kind}))

    def finish(
        self,
        batches: Sequence[Sequence[int]],
        make: Callable[[Sequence[int]], Any],
        identity: Callable[[Sequence[int]], Mapping[str, Any]],
        description: str,
        progress: bool,
    ) -> list[tuple[Sequence[int], Any]]:
        """Each batch with what `make` gives for it, from the store where it is there. identity: of a batch's unit."""
        identities = {tuple(batch): identity(batch) for batch in batches}
        names = {batch: digest_json(each) for batch, each in identities.items()}
        processes = Processes(torch.device("cpu"))
        values = self.store.finish(
            names, make, description, processes, identity=identities.__getitem__, progress=progress, size=len
        )
        return list(values.items())


NOT_COMPARED = ("_name_or_path", "transformers_version", "use_cache")  # of a configuration: what changes no number


def cache_folder() -> Path:
    """Where readings and texts are kept between runs: $PYUNLEARN_CACHE, or pyunlearn in the user's cache folder."""
    own = os.environ.get("PYUNLEARN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyunlearn"


def read_rows(
    model: nn.Module | CausalLM,
    rows: Sequence[Mapping[str, Tensor]],
    *,
    outputs: Sequence[str] = (),
    batch_size: int = 16,
    kept: Kept | None = None,
    progress: bool = True,
) -> list[Reading]:
    """What the model makes of each row (input_ids, labels), in their order; outputs: beside logp and greedy.

    No logits of a whole batch are made. Rows go through in batches of similar length; the model is in eval() meanwhile.
    A row's numbers are its own whatever it is batched with, up to the rounding of the model's dtype.

    Raises ValueError for no rows, a row without supervised tokens, log-probabilities that are not finite, or a model
    that is not causal or whose logits are not those of its output layer.
    """
    if not rows:
        raise ValueError("dataset: is empty, needs at least one row")
    for i, row in enumerate(rows):
        if not bool((row["labels"][1:] != -100).any()):
            raise ValueError(f"dataset[{i}]: has no supervised token, so no metric is defined for it")
    lm = CausalLM.of(model)
    names = (*BASE, *dict.fromkeys(name for name in outputs if name not in BASE))

    def read(batch: Sequence[int]) -> dict[str, Tensor]:
        inputs = {name: value.to(lm.device) for name, value in collate([rows[i] for i in batch], 0).items()}
        stats, seen = token_stats_of(lm, inputs, names)
        check_finite(stats.logp, seen.sequence_ids, batch)
        return {"sequence_ids": seen.sequence_ids.cpu(), **{name: getattr(stats, name).cpu() for name in names}}

    def identity(batch: Sequence[int]) -> dict[str, Any]:
        return {"read": dataset_fingerprint([rows[i] for i in batch]), "outputs": names}

    batches = length_batches([len(row["labels"]) for row in rows], batch_size)
    readings: dict[int, Reading] = {}
    with eval_mode(lm.given), torch.no_grad():
        for batch, tensors in (kept or Kept(None, lm)).finish(batches, read, identity, "reading", progress):
            counts = torch.bincount(tensors["sequence_ids"], minlength=len(batch)).tolist()
            parts = {name: tensors[name].split(counts) for name in names}
            for place, i in enumerate(batch):
                own = {name: part[place] for name, part in parts.items()}
                readings[i] = Reading(own.pop("logp"), own.pop("greedy"), own)
    return [readings[i] for i in range(len(rows))]
