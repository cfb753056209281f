"""Runs the batches of a step through a model as one tree of tokens, once a trial has shown that it says the same.

The attention of transformers is asked by another name meanwhile, under which it sees the rows of the tree.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .._declined import decline
from .causal_lm import CausalLM, eval_mode, rotary_limits
from .forward import NOT_MODEL_INPUTS, PADDED, Layer, Positions, Supervised, layer_number, supervised_hidden
from .packed import WINDOWS
from .tap import Tap
from .tree import ARGUMENT, Batch, Rows, Tree, grow

PREFIX = "rows|"  # of the name of an attention that knows `Rows`; behind it, the model's own
PACKED, SHARED = "packed rows", "shared tokens"  # the optimisations, for those told that one is not used
INPUTS = {"input_ids", "attention_mask", *NOT_MODEL_INPUTS}  # that a batch may have
TOLERANCE = 1e-4  # of a hidden state, relative to its norm, or 8 roundings of the dtype that the model computes in


@functools.cache  # a graph is of one function
def attention_of(name: str) -> Callable[..., Any]:
    """The attention `name` of transformers, which sees `Rows` where a forward has been given them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        # "eager" is a function of each model's own file
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        own: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        rows: Rows | None = options.pop(ARGUMENT, None)
        if rows is None:
            return own(module, query, key, value, attention_mask, **options)
        options.pop("position_ids", None)  # of the L tokens
        mask = None
        if name == "eager":  # others are causal without one
            length = rows.slots.size(1)
            mask = query.new_full((length, length), torch.finfo(query.dtype).min).triu(1)[None, None]
        seen = (rows.spread(x) for x in (query, key, value))
        return rows.collect(own(module, *seen, mask, **options)[0]), None

    return attention


@contextmanager
def attending(lm: CausalLM) -> Iterator[None]:
    """Inside, the model's attention knows `Rows`; without them it is its own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    config, name = lm.config, lm.config._attn_implementation
    AttentionInterface.register(PREFIX + name, attention_of(name))
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = PREFIX + name
    try:
        yield
    finally:
        config._attn_implementation = name


class Packing:
    """Runs the batches of a step through a model as one tree of tokens, where a trial on the first has shown that the
    model says the same of them so. share: False: without padding, but each row whole.

    declined: why it does not, or not wholly. tokens, padded: how many the model has been run on, and how many positions
    the batches have had, since it was made; trials do not count.

        packing = Packing()
        with packing:      # models that are run inside have an attention that knows `Rows`, up to the last backward
            states = packing.hidden(model, batches, positions)
    """

    def __init__(self, share: bool = True) -> None:
        self.share = share
        self.proved: bool | None = None
        self.declined: dict[str, str] = {}
        self.tokens = self.padded = 0
        self._models: ExitStack | None = None

    def __enter__(self) -> Packing:
        self._models = ExitStack()
        return self

    def __exit__(self, *error: Any) -> None:
        models, self._models = self._models, None
        if models is not None:
            models.close()

    @property
    def entered(self) -> bool:
        return self._models is not None

    def as_dict(self) -> dict[str, Any]:
        """Whether it was of use, and why not, or not wholly."""
        return {"used": self.tokens > 0, "declined": self.declined}

    def hidden(
        self,
        model: nn.Module | CausalLM,
        batches: Mapping[str, Batch],
        positions: Mapping[str, Positions],
        layers: Mapping[str, Iterable[Layer]] | None = None,
        through_head: bool = True,
    ) -> dict[str, Supervised]:
        """`supervised_hidden` of each batch, out of one forward. Arguments as there, by batch.

        Those are missing that have to go through the model one after another, as they are. Raises RuntimeError outside
        of `with`.
        """
        if self._models is None:  # a backward that computes activations again would do so with another attention
            raise RuntimeError("Packing.hidden: needs `with packing:` around the forward and its backward")
        lm = CausalLM.of(model)
        for kind in [kind for kind in batches if positions[kind] in PADDED]:
            self._refuses(f"positions={positions[kind]!r} count padding")
        batches = {kind: batch for kind, batch in batches.items() if positions[kind] not in PADDED}
        wanted = {kind: tuple((layers or {}).get(kind, ())) for kind in batches}
        if not batches or self.proved is False or self._refuses(reason_not_to_pack(lm, batches)):
            return {}
        if not (getattr(lm.config, "_attn_implementation", None) or PREFIX).startswith(PREFIX):
            self._models.enter_context(attending(lm))
        share = self.share and not drops_out(lm)
        if self.share and not share:
            self.declined[SHARED] = decline(SHARED, f"{lm.name} has dropout, which each row draws for itself")
        tree = grow(batches, positions, share)
        if tree is None:
            return {}
        if self.proved is None:
            self.proved = not self._refuses(reason_from_trial(lm, tree, batches, positions, wanted))
            if not self.proved:
                return {}
        self.tokens += tree.ids.numel()
        self.padded += tree.padded
        return run(lm, tree, wanted, through_head)

    def _refuses(self, reason: str | None) -> bool:
        if reason is not None:
            self.declined[PACKED] = decline(PACKED, reason)
        return reason is not None


def run(
    lm: CausalLM, tree: Tree, layers: Mapping[str, Sequence[Layer]], through_head: bool, **change: Any
) -> dict[str, Supervised]:
    """Of each batch of the tree. change: of the model's inputs."""
    numbers = {layer: layer_number(lm, layer) for own in layers.values() for layer in own}
    last = None if through_head or not numbers else max(numbers.values())
    tap = Tap(lm, {*numbers.values()}, last)
    tap.run(tree.inputs | change)
    # those of several rows once: the sum of their gradients is then that of an index, always the same
    counted, where = torch.cat([*tree.places.values()]).unique(return_inverse=True)
    states = {n: tap.at(n, counted, tree.ids.shape) for n in {tap.last, *numbers.values()}}
    found = {}
    parts = where.split([len(own) for own in tree.places.values()])
    for (kind, targets), at in zip(tree.targets.items(), parts, strict=True):
        own = {n: states[n][at.to(states[n].device)] for n in {tap.last, *(numbers[layer] for layer in layers[kind])}}
        hidden = own[tap.last]
        rest = targets.to(hidden.device), tree.sequence_ids[kind].to(hidden.device), tree.sizes[kind]
        found[kind] = Supervised(hidden, *rest, {layer: own[numbers[layer]] for layer in layers[kind]})
    return found


def reason_not_to_pack(lm: CausalLM, batches: Mapping[str, Batch]) -> str | None:
    """Why the batches have to go through the model as they are, as far as that can be told without a forward."""
    if lm.sharded or (lm.wrapped and not isinstance(lm.called, nn.parallel.DistributedDataParallel)):
        return "sharded weights are gathered by all processes together, so that all have to run forwards in step"
    if getattr(lm.inner.get_input_embeddings(), "neftune_noise_alpha", None):
        return "the noise of NEFTune depends on the length of a row"
    longest = 0
    for batch in batches.values():
        if more := [name for name in batch if name not in INPUTS]:
            return f"the batches have {more} too"
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape != batch["input_ids"].shape:
            return "the batches have an attention_mask of another shape than input_ids"
        if mask is not None and has_gaps(mask):
            return "the rows have padding between tokens"
        longest = max(longest, batch["input_ids"].size(1))
    if any(longest > limit for _, limit in rotary_limits(lm.config)):
        return f"the rotary factors of {lm.name} depend on the length of a sequence"
    for name in WINDOWS:
        if (window := getattr(lm.config, name, None)) and longest > window:
            return f"rows of {longest} tokens are longer than the {name} of {lm.name}, {window}"
    return None


def has_gaps(mask: Tensor) -> bool:
    """Whether there is padding between tokens of a row."""
    starts = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    return bool((starts.sum(1) + (mask[:, 0] != 0) > 1).any())


class Counted(Rows):
    """Of a trial: how often queries, keys or values were spread."""

    calls = 0

    def spread(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().spread(x)


@torch.no_grad()
def reason_from_trial(
    lm: CausalLM,
    tree: Tree,
    batches: Mapping[str, Batch],
    positions: Mapping[str, Positions],
    layers: Mapping[str, Sequence[Layer]],
) -> str | None:
    """Why the model cannot be run on this tree, by trying both ways; None: it can, and says the same."""
    lm, rows = CausalLM(lm.alone), Counted(*tree.rows)
    with eval_mode(lm.alone):
        try:
            found = run(lm, tree, layers, True, **{ARGUMENT: rows})
        except Exception as error:  # in ways of their own
            return f"{lm.name} does not take them ({type(error).__name__})"
        if rows.calls != 3 * lm.depth:
            return f"not all layers of {lm.name} have an attention of transformers' AttentionInterface"
        for kind, batch in batches.items():
            expected = supervised_hidden(lm, batch, positions[kind], layers=layers[kind])
            own = found[kind]
            if not close(own.hidden, expected.hidden) or not all(
                close(own.layers[layer], expected.layers[layer]) for layer in layers[kind]
            ):
                return f"the hidden states of {lm.name} are others"
    return None


def close(found: Tensor, expected: Tensor) -> bool:
    """Each row, as far as the dtype that it was computed in can tell."""
    tolerance = tolerance_of(found)
    found, expected = found.double(), expected.double()
    return bool(((found - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())


def tolerance_of(found: Tensor) -> float:
    """Of its norm."""
    device, dtype = found.device.type, found.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return max(TOLERANCE, 8 * torch.finfo(dtype).eps)


def drops_out(lm: CausalLM) -> bool:
    """Whether a forward, as the model stands, draws at random what it drops."""
    training = [module for module in lm.alone.modules() if module.training]
    values = [module.p for module in training if isinstance(module, _DropoutNd)]
    if training:  # attention and experts have theirs from the configuration
        settings = {name: value for name, value in vars(lm.config).items() if "drop" in name or "jitter" in name}
        values += [value for name, value in settings.items() if not name.startswith(("classifier", "summary"))]
    return any(isinstance(value, float) and value > 0 for value in values)
