"""What a model makes of texts that it is given (`read_rows`), batch by batch, each kept as soon as it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._declined import decline
from ..data import collate
from ..distributed import Processes
from ..model.causal_lm import CausalLM, eval_mode
from ..model.fingerprint import dataset_fingerprint, model_fingerprint
from ..model.forward import check_finite, length_batches, supervised_stats
from ..model.packed import by_prompt, pack, packed_length, reason_from_trial, reason_not_to_pack
from ..store import Store, digest_json

FORMAT = 1  # of what is kept: a later one does not read an earlier one's
BASE = ("logp", "greedy")
SHARED = "shared prompts"


@dataclass(frozen=True)
class Reading:
    """One text as a model reads it: tensors (n,) on the CPU, over its supervised tokens in reading order.

    logp: log-probabilities in nats, float32 (float64 of a float64 model). greedy: bool, whether the token is the most
    likely one. more: further outputs of `token_stats` by name, e.g. entropy, variance. tokens: int64, their ids.
    """

    logp: Tensor
    greedy: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

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
    any number of runs at once; it may be deleted at any time. declined: by optimisation that was not used, why.
    """

    def __init__(self, folder: str | Path | None, model: nn.Module | CausalLM):
        self.store = Store(None)
        self.declined: dict[str, str] = {}
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
    Of rows with the same prompt, the tokens before the first scored one, the prompt goes through once where that spares
    a tenth of all tokens and the model allows it (`model.packed`); `kept.declined` says where not, and why. A row's
    numbers are its own whatever it is batched with, up to the rounding of the model's dtype.

    Raises ValueError for no rows, a row without supervised tokens, log-probabilities that are not finite, or a model
    that is not causal or whose logits are not those of its output layer.
    """
    if not rows:
        raise ValueError("dataset: is empty, needs at least one row")
    for i, row in enumerate(rows):
        if not bool((row["labels"][1:] != -100).any()):
            raise ValueError(f"dataset[{i}]: has no supervised token, so no metric is defined for it")
    lm = CausalLM.of(model)
    kept = Kept(None, lm) if kept is None else kept
    names = (*BASE, *dict.fromkeys(name for name in outputs if name not in BASE))
    groups = shared_prompts(lm, rows, batch_size, kept)
    lengths, counts = [packed_length([rows[i] for i in group]) for group in groups], [len(group) for group in groups]
    batches = [[groups[at] for at in batch] for batch in length_batches(lengths, batch_size, counts)]
    groups_of = {tuple(i for group in batch for i in group): batch for batch in batches}
    packed = cache(lambda: allows_packs(lm, [[rows[i] for i in group] for group in groups], kept))
    dtype = lm.inner.get_input_embeddings().weight.dtype

    def read(batch: Sequence[int]) -> dict[str, Tensor]:
        together = groups_of[tuple(batch)]
        if len(together) < len(batch) and packed():
            texts = pack([[rows[i] for i in group] for group in together], dtype)
            stats, ids = texts.stats(lm, names), texts.sequence_ids
        else:
            inputs = {name: value.to(lm.device) for name, value in collate([rows[i] for i in batch], 0).items()}
            stats, seen = supervised_stats(lm, inputs, names)
            ids = seen.sequence_ids
        check_finite(stats.logp, ids, batch)
        return {"sequence_ids": ids.cpu(), **{name: getattr(stats, name).cpu() for name in names}}

    def identity(batch: Sequence[int]) -> dict[str, Any]:
        return {"read": dataset_fingerprint([rows[i] for i in batch]), "outputs": names}

    readings: dict[int, Reading] = {}
    with eval_mode(lm.given), torch.no_grad():
        for batch, tensors in kept.finish([*groups_of], read, identity, "reading", progress):
            counts = torch.bincount(tensors["sequence_ids"], minlength=len(batch)).tolist()
            parts = {name: tensors[name].split(counts) for name in names}
            for place, i in enumerate(batch):
                own = {name: part[place] for name, part in parts.items()}
                labels = rows[i]["labels"][1:]
                readings[i] = Reading(own.pop("logp"), own.pop("greedy"), own, labels[labels != -100])
    return [readings[i] for i in range(len(rows))]


def shared_prompts(lm: CausalLM, rows: Sequence[Mapping[str, Tensor]], batch_size: int, kept: Kept) -> list[list[int]]:
    """Places of rows that go through the model together, those with one prompt; each alone where that is no use."""
    alone = [[i] for i in range(len(rows))]
    groups = by_prompt(rows, batch_size)
    if len(groups) == len(rows):
        return alone
    reason = reason_not_to_pack(lm, rows, groups)
    if reason is None:
        return groups
    kept.declined[SHARED] = decline(SHARED, reason)
    return alone


def allows_packs(lm: CausalLM, groups: Sequence[Sequence[Mapping[str, Tensor]]], kept: Kept) -> bool:
    """Whether the longest group of several rows is read as these are alone."""
    longest = max((group for group in groups if len(group) > 1), key=packed_length)
    reason = reason_from_trial(lm, longest)
    if reason is not None:
        kept.declined[SHARED] = decline(SHARED, reason)
    return reason is None
