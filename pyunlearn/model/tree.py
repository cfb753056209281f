"""Rows of a step as a tree of tokens: what rows begin with alike goes through the model once, padding not at all.

What a causal model says of a token depends on the tokens before it alone. So the tokens of all batches of a step, those
that several rows begin with once, are one row of L tokens: embeddings, norms, projections and MLPs, which work token by
token, do no more than they must. Attention, which does not, sees the rows as they are: queries, keys and values are
copied out to B rows of T, padded on the right where no token looks, and its results are copied back. Gradients go the
same way back, and a shared token's keys and values get the sum over its rows, in an order that is always the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .._declined import decline
from .causal_lm import CausalLM, eval_mode, rotary_limits
from .forward import (
    NOT_MODEL_INPUTS,
    PADDED,
    Layer,
    Positions,
    Supervised,
    layer_number,
    select_positions,
    supervised_hidden,
)
from .packed import WINDOWS
from .tap import Tap

PREFIX = "rows|"  # of the name of an attention that knows `Rows`; behind it, the model's own
ARGUMENT = "token_rows"  # of a forward, which hands it on to its attention
PACKED, SHARED = "packed rows", "shared tokens"  # the optimisations, for those told that one is not used
INPUTS = {"input_ids", "attention_mask", *NOT_MODEL_INPUTS}  # that a batch may have
TOLERANCE = 1e-4  # of a hidden state, relative to its norm, or 8 roundings of the dtype that the model computes in
Batch = Mapping[str, Tensor]


class Rows(NamedTuple):
    """Where the L tokens stand in B rows of T.

    slots: (B, T), the token there; any where there is none. owners: (L,), a place of the flattened B*T where each token
    stands. shared: (S,), the tokens that stand at others too, uses: (S, U), which; padding (S, U): where there is none.
    S and U are at least 2, of nothing but padding if need be: of sizes of 0 and 1 torch.compile makes graphs apart.
    """

    slots: Tensor
    owners: Tensor
    shared: Tensor
    uses: Tensor
    padding: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """(1, heads, L, d) -> (B, heads, T, d)."""
        rows = _Spread.apply(x.transpose(1, 2).squeeze(0), *self)
        return rows.unflatten(0, self.slots.shape).transpose(1, 2)

    def collect(self, x: Tensor) -> Tensor:
        """(B, T, heads, d) -> (1, L, heads, d)."""
        return _Collect.apply(x.flatten(0, 1), self.owners).unsqueeze(0)


class _Spread(torch.autograd.Function):
    """x[slots]. A gather in both directions: no sum whose order is left to threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(*rest)
        return x.index_select(0, slots.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owners, shared, uses, padding = ctx.saved_tensors
        total = grad.index_select(0, owners)
        more = grad.index_select(0, uses.flatten()).unflatten(0, uses.shape)
        more = more.masked_fill(padding[(...,) + (None,) * (grad.dim() - 1)], 0).sum(1)
        return total.index_add(0, shared, more), *[None] * 5


class _Collect(torch.autograd.Function):
    """x[owners], which are all different."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.size = x.size(0)
        return x.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owners,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy(0, owners, grad), None


@dataclass(frozen=True)
class Tree:
    """The L tokens of some batches. ids, positions: (1, L), each token and its place in its rows. places: of each
    batch, (N,), which of the L are its positions that count; targets, sequence_ids: as in `Supervised`, (N,) each.
    padded: positions that the batches have."""

    ids: Tensor
    positions: Tensor
    rows: Rows
    places: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_ids: dict[str, Tensor]
    sizes: dict[str, int]
    padded: int

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the model. The mask says nothing: it keeps the model from making one."""
        mask = torch.zeros(1, 1, 1, 1, device=self.ids.device)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask, ARGUMENT: self.rows}


def grow(batches: Mapping[str, Batch], positions: Mapping[str, Positions], share: bool) -> Tree | None:
    """The tree of all their rows, each from its first token that is no padding to its last position that counts; None
    where no position does. share: False: a token is of one row alone, even where another begins with it.

    Raises what `select_positions` raises.
    """
    ids: list[int] = []
    places: list[int] = []
    children: dict[tuple[int, int], int] = {}  # (token before, or a root; id) -> token, as numbers among the L
    paths: list[list[int]] = []  # of every row, its tokens
    chosen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    at: dict[str, list[int]] = {}
    for kind, given in batches.items():
        batch = {name: value.cpu() for name, value in given.items()}  # a GPU is waited for here, and not below
        rows, _, _ = chosen[kind] = select_positions(batch, positions[kind])
        length = batch["input_ids"].size(1)
        starts, tokens = starts_of(batch), batch["input_ids"].tolist()
        of_row: list[list[int]] = [[] for _ in tokens]
        for row in rows.tolist():
            of_row[row // length].append(row % length)
        at[kind] = []
        for start, own, counted in zip(starts, tokens, of_row, strict=True):
            if not counted:
                continue
            path, before = [], -1 if share else -1 - len(paths)
            for t, token in enumerate(own[start : counted[-1] + 1]):
                before = children.setdefault((before, token), len(ids))
                if before == len(ids):
                    ids.append(token)
                    places.append(t)
                path.append(before)
            paths.append(path)
            at[kind] += [path[t - start] for t in counted]
    if not paths:
        return None
    device = next(iter(batches.values()))["input_ids"].device

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Tree(
        tensor([ids]),
        tensor([places]),
        rows_of(paths, len(ids), tensor),
        {kind: tensor(own) for kind, own in at.items()},
        {kind: targets for kind, (_, targets, _) in chosen.items()},
        {kind: owners for kind, (_, _, owners) in chosen.items()},
        {kind: len(batch["input_ids"]) for kind, batch in batches.items()},
        sum(batch["input_ids"].numel() for batch in batches.values()),
    )


def starts_of(batch: Batch) -> list[int]:
    """Where each row's first real token is."""
    mask = batch.get("attention_mask")
    return [0] * len(batch["input_ids"]) if mask is None else (mask != 0).int().argmax(1).tolist()


def has_gaps(mask: Tensor) -> bool:
    """Whether there is padding between tokens of a row."""
    starts = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    return bool((starts.sum(1) + (mask[:, 0] != 0) > 1).any())


def rows_of(paths: Sequence[Sequence[int]], count: int, tensor: Callable[[Any], Tensor]) -> Rows:
    """`Rows` of the tokens of each, of `count` in all."""
    length = max(map(len, paths))
    owners, more = [-1] * count, dict[int, list[int]]()
    for b, path in enumerate(paths):
        for t, token in enumerate(path):
            if owners[token] < 0:
                owners[token] = b * length + t
            else:
                more.setdefault(token, []).append(b * length + t)
    shared = [*more.items(), *[(0, [])] * (2 - len(more))]
    most = max(2, *(len(own) for _, own in shared))
    return Rows(
        slots=tensor([[*path, *[0] * (length - len(path))] for path in paths]),
        owners=tensor(owners),
        shared=tensor([token for token, _ in shared]),
        uses=tensor([[*own, *[0] * (most - len(own))] for _, own in shared]),
        padding=tensor([[0] * len(own) + [1] * (most - len(own)) for _, own in shared]) != 0,
    )


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
