"""What stands for the frozen reference model: numbers kept in a file, a live model, or the model without its adapters.

    Cached(ReferenceCache.build(model, rows, path))   computed once; no second model in memory
    Live(frozen)                                      a second model, which also serves padding and rows never seen
    AdapterOff(model)                                 a LoRA run's own base: no second model and no file

All answer for a batch of one kind of sequence (input_ids, labels, attention_mask (B, T) and index (B,)), without
gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from ..distributed import local
from .cache import ReferenceCache
from .causal_lm import CausalLM, eval_mode
from .forward import PADDED, Layer, Positions, Supervised, select_positions, supervised_hidden, widest
from .head import Head, head_stats
from .packing import Packing

Batch: TypeAlias = Mapping[str, Tensor]


@runtime_checkable
class Reference(Protocol):
    """Per-token numbers of a frozen model."""

    def check(self, name: str, positions: Positions, kl: bool, layers: Collection[Layer]) -> None:
        """Raises ValueError, which calls it `name`, unless it serves hidden states at these positions.

        kl: the last hidden states, and the head. layers: whose others.
        """

    def to(self, device: torch.device) -> None:
        """Where the batches will be."""

    def scalars(
        self,
        batch: Batch,
        outputs: Sequence[str] = ("logp",),
        positions: Positions = "supervised",
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Numbers of each token, (N,) float32, by output of `token_stats`, of logits / temperature."""

    def hidden(self, batch: Batch, positions: Positions, layer: Layer | None = None) -> Tensor:
        """(N, H): hidden states of a layer, None: those that the head gets, at `positions`."""

    def head(self, like: Tensor) -> Head:
        """Its head as one matrix, on the device and in the dtype of `like`; after `hidden`, which gathers shards."""

    def release(self) -> None:
        """Lets go of what it holds on the device and can have again."""


Source: TypeAlias = ReferenceCache | nn.Module | Reference


class Cached:
    """A `ReferenceCache` of the rows that batches hold by index."""

    def __init__(self, cache: ReferenceCache):
        self.cache = cache
        self._head: Head | None = None

    def check(self, name: str, positions: Positions, kl: bool, layers: Collection[Layer]) -> None:
        metadata = self.cache.metadata
        stored = metadata["positions"] if metadata["kl" if kl else "layers"] else None
        if stored is None or widest({stored, positions}) != stored:
            wanted = widest({positions, "supervised"})
            options = ", ".join(["kl=True"] * kl + [f"layers={sorted(layers, key=str)}"] * bool(layers))
            raise ValueError(
                f"{name}: the objectives need hidden states at {positions!r} positions, the cache has "
                f"{'none' if stored is None else repr(stored)}; build it with {options}, positions={wanted!r}"
                + (" (padding is never cached: give a live model)" if positions in PADDED else "")
            )
        for layer in layers:
            self.cache.find_layer(layer)

    def to(self, device: torch.device) -> None:
        pass  # its numbers go where a batch's index is

    def scalars(
        self,
        batch: Batch,
        outputs: Sequence[str] = ("logp",),
        positions: Positions = "supervised",
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        if positions != "supervised":
            raise ValueError(f"{self.cache.path} has numbers of supervised tokens, not of {positions!r} positions")
        return {name: self.cache.scalar(name, batch["index"], temperature) for name in outputs}

    def hidden(self, batch: Batch, positions: Positions, layer: Layer | None = None) -> Tensor:
        hidden, stored = self.cache.hidden(batch["index"], layer), self.cache.metadata["positions"]
        if stored == positions:
            return hidden
        at = torch.searchsorted(select_positions(batch, stored)[0], select_positions(batch, positions)[0])
        return hidden.index_select(0, at)

    def head(self, like: Tensor) -> Head:
        head = self.cache.head if self._head is None else self._head
        self._head = head.to(like)  # moved once, not in every step
        return self._head

    def release(self) -> None:
        self._head = None


class Live:
    """A frozen model, in evaluation mode from here on.

    packing: with one, a batch goes through it without padding, and what its rows begin with once.
    """

    packing: Packing | None = None

    def __init__(self, model: nn.Module | CausalLM):
        self.lm = CausalLM.of(model)
        self.lm.given.eval()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, its model is the reference."""
        with torch.no_grad():
            yield

    def check(self, name: str, positions: Positions, kl: bool, layers: Collection[Layer]) -> None:
        pass  # it computes what it is asked for

    def to(self, device: torch.device) -> None:
        self.lm.given.to(device)

    def scalars(
        self,
        batch: Batch,
        outputs: Sequence[str] = ("logp",),
        positions: Positions = "supervised",
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        with self.frozen():
            self.lm.check_head()
            states = self._states(batch, positions)
            head = self.lm.read_head()
            return head_stats(head, states.hidden, states.targets, outputs, temperature=temperature).as_dict()

    def hidden(self, batch: Batch, positions: Positions, layer: Layer | None = None) -> Tensor:
        with self.frozen():
            if layer is None:
                self.lm.check_head()
                return self._states(batch, positions).hidden
            return self._states(batch, positions, [layer], through_head=False).layers[layer]

    def head(self, like: Tensor) -> Head:
        with self.frozen():
            return self.lm.read_head().merged().to(like)

    def release(self) -> None:
        pass

    def _states(
        self, batch: Batch, positions: Positions, layers: Collection[Layer] = (), through_head: bool = True
    ) -> Supervised:
        if self.packing is not None:
            with self.packing as packing:
                found = packing.hidden(self.lm, {"": batch}, {"": positions}, {"": layers}, through_head)
            if found:
                return found[""]
        return supervised_hidden(self.lm, batch, positions, layers=layers, through_head=through_head)


class AdapterOff(Live):
    """The model that is trained, with its peft adapters switched off meanwhile: their base, in evaluation mode.

    Adapters, what requires gradients, and every module's train or eval mode are afterwards what they were before.
    Raises TypeError for a model without adapters, ValueError for merged ones, or if weights of the base are trained
    too, so that it is no fixed reference.
    """

    def __init__(self, model: nn.Module | CausalLM):
        alone = CausalLM.of(model).alone
        if not hasattr(alone, "disable_adapter"):
            raise TypeError(f"reference: AdapterOff needs a model under peft, got {type(alone).__name__}")
        if any(getattr(module, "merged", False) for module in alone.modules()):
            raise ValueError("reference: AdapterOff needs adapters that are not merged into the weights of their base")
        self.lm = CausalLM(alone)
        with adapters_off(alone):
            trained = [name for name, parameter in alone.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(
                f"reference: AdapterOff needs a frozen base, but {trained[0]!r} is trained and no adapter's; "
                "give a ReferenceCache"
            )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with adapters_off(self.lm.given), eval_mode(self.lm.given), torch.no_grad():
            yield

    def to(self, device: torch.device) -> None:
        pass  # its model is the trainer's


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """`model.disable_adapter()`, which switches gradients on for all active adapters, frozen parts too, on its exit."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def check_apart(references: Mapping[str, Reference], model: nn.Module) -> None:
    """Raises ValueError for a live reference that holds weights which the training of `model` moves.

    Frozen ones may be shared, such as the base of adapters.
    """
    trained = {place_of(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    for kind, reference in references.items():
        if not isinstance(reference, Live) or isinstance(reference, AdapterOff):
            continue
        for weight in reference.lm.given.parameters():
            if weight.numel() and weight.device.type != "meta" and place_of(weight) in trained:
                raise ValueError(
                    f"reference[{kind!r}]: needs weights of its own, {trained[place_of(weight)]!r} is that of the "
                    "model itself and would be trained along; give copy.deepcopy(model), a ReferenceCache or, for a "
                    "model under peft, AdapterOff(model)"
                )


def place_of(weight: Tensor) -> tuple[torch.device, int]:
    """Where this rank's part of it lies in memory, whatever view of it this is."""
    return weight.device, local(weight).untyped_storage().data_ptr()


def as_reference(source: Source) -> Reference:
    """Raises TypeError for what is no reference."""
    if isinstance(source, ReferenceCache):
        return Cached(source)
    if isinstance(source, nn.Module):
        return Live(source)
    if isinstance(source, Reference):
        return source
    raise TypeError(f"reference: needs a ReferenceCache, a frozen model or a Reference, got {type(source).__name__}")


def as_references(sources: Source | Mapping[str, Source] | None, kinds: Collection[str]) -> dict[str, Reference]:
    """Kind of sequence -> its reference, for those of `kinds` that have one.

    One source serves all kinds, but a cache, which is of one data set's rows, one.
    """
    if sources is None:
        return {}
    if isinstance(sources, Mapping):
        return {kind: as_reference(sources[kind]) for kind in kinds if kind in sources}
    reference = as_reference(sources)
    return {} if isinstance(reference, Cached) and len(kinds) > 1 else dict.fromkeys(kinds, reference)
