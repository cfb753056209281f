"""From a causal LM and a batch to per-token statistics, without logits of the whole batch.

The model is called as a whole, wrappers included, so that what DDP, FSDP, peft and accelerate do around a
forward happens. Just before the LM head its input is kept and the head is given no rows instead. The kept
hidden states are cut down to the positions that count, and only those meet the head's weight, in
`linear_token_stats`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import TokenStats, token_stats
from .causal_lm import CausalLM
from .combined import combine, parts_of
from .head import Head, head_stats
from .tap import Tap

IGNORE_INDEX = -100
Layer = int | str
DEPTHS = {"shallow": 1, "middle": 2, "deep": 3}  # thirds of the blocks, as in pyunlearn.objectives
Positions = Literal["supervised", "template_free", "real", "followed", "all"]
POSITIONS = ("supervised", "template_free", "real", "followed", "all")  # `widest` says which hold others
PADDED = ("followed", "all")  # hold padding, of which a model says what the batch makes it say
NOT_MODEL_INPUTS = ("labels", "index", "text_mask")
PIECE = 1 << 24  # logits of two models that are in memory at once


@dataclass(frozen=True)
class Supervised:
    """The N positions of a batch that count, sequence after sequence, each in reading order.

    hidden: (N, H) in the model's dtype; targets: (N,) int64, the token that follows; sequence_ids: (N,)
    int64, the row of the batch, in [0, num_sequences). layers: by layer asked for, its hidden states (N, H).
    """

    hidden: Tensor
    targets: Tensor
    sequence_ids: Tensor
    num_sequences: int
    layers: Mapping[Layer, Tensor] = field(default_factory=dict)


def select_positions(batch: Mapping[str, Tensor], positions: Positions = "supervised") -> tuple[Tensor, Tensor, Tensor]:
    """Which of a batch's B*T positions count: (rows, targets, sequence_ids), each (N,) int64; row = b*T + t.

    "real": tokens t and t + 1 are both real (attention_mask; all are where there is none). "supervised": of these,
    those with labels[b, t + 1] != -100, the next label is the target: nothing is scored from padding, at whichever end
    it is. "template_free": of the real ones, those with text_mask[b, t + 1] != 0: the next token is the question's or
    the answer's, not the prompt format's own (`pyunlearn.data.QADataset` with text_mask=True). "followed": every
    position but the last, padding too, as in losses over shifted, unmasked logits. "all": the last one too, as in
    losses over unmasked logits; it has no next token and gets its own as a placeholder: use "all" for statistics that
    need no target (entropy, KL).

    Runs where the labels are: with the batch still on the CPU this costs a GPU no synchronisation.
    Raises ValueError for unknown positions, missing or misshapen tensors.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r}: needs one of {POSITIONS}")
    ids = _tensor(batch, "input_ids")
    if ids.dim() != 2 or ids.size(1) < 1:
        raise ValueError(f"batch['input_ids']: needs shape (B, T) with T >= 1, got {tuple(ids.shape)}")
    length = ids.size(1)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
    if positions in PADDED:
        keep[:, : length if positions == "all" else -1] = True
    else:
        real = _real(batch)
        keep[:, :-1] = True if real is None else real[:, 1:] & real[:, :-1]
    if positions == "template_free":
        if "text_mask" not in batch:
            raise ValueError(
                "positions='template_free': needs batch['text_mask'], (B, T), 1 at tokens of question and answer and 0 "
                f"at the prompt format's, as rows of QADataset(..., text_mask=True) have; the batch has {sorted(batch)}"
            )
        keep[:, :-1] &= _tensor(batch, "text_mask", ids.shape)[:, 1:] != 0
    if positions == "supervised":
        labels = _tensor(batch, "labels", ids.shape)
        keep[:, :-1] &= labels[:, 1:] != IGNORE_INDEX
        following = torch.cat([labels[:, 1:], labels[:, -1:]], dim=1)
    sequence_ids, column = keep.nonzero(as_tuple=True)
    return sequence_ids * length + column, following[sequence_ids, column], sequence_ids


def widest(positions: Collection[Positions]) -> Positions:
    """The narrowest that hold all of these: each holds those before it in `POSITIONS`, but what ends an answer is
    supervised and the template's own."""
    last = max(positions, key=POSITIONS.index)
    return "real" if last == "template_free" and "supervised" in positions else last


def layer_number(model: nn.Module | CausalLM, layer: Layer) -> int:
    """The place in transformers' `hidden_states` (1 to D) of a layer, for a model of D blocks.

    layer: 1 is the first block's output, D what the LM head gets (after the final norm), -1 the same as D; "shallow",
    "middle" and "deep" are D // 3, 2 D // 3 and D, as in the G-effect paper's code.
    Raises ValueError that names the layer where the model has none such.
    """
    lm = CausalLM.of(model)
    return number_of(layer, lm.depth, lm.name)


def number_of(layer: Layer, depth: int, name: str = "the model") -> int:
    """`layer_number` for a model of `depth` blocks; name: what the error calls it."""
    if isinstance(layer, str) and layer in DEPTHS:
        return max(1, DEPTHS[layer] * depth // 3)
    if isinstance(layer, int) and not isinstance(layer, bool) and 1 <= abs(layer) <= depth:
        return layer % (depth + 1)
    raise ValueError(
        f"layer={layer!r}: {name} has {depth} layers, needs 1 to {depth}, -{depth} to -1, or one of {', '.join(DEPTHS)}"
    )


def supervised_hidden(
    model: nn.Module | CausalLM,
    batch: Mapping[str, Tensor],
    positions: Positions = "supervised",
    *,
    layers: Iterable[Layer] = (),
    through_head: bool = True,
) -> Supervised:
    """Last hidden states (what the LM head would get) at the positions that count, with gradients.

    model: a transformers causal LM, plain or inside DistributedDataParallel, FSDP, DeepSpeed, peft or
    accelerate. Of `torch.compile(model)` the original is run, uncompiled: compile its decoder
    (`model.get_decoder().compile()`).
    batch: input_ids (B, T), attention_mask and labels (B, T), and any other model input, on the model's
    device; "labels" and "index" are not passed on. positions: see `select_positions`.
    layers: whose hidden states to keep too (`layer_number`), in `Supervised.layers`; no other layer's are.
    through_head: False where `layers` are all that matters: `Supervised.hidden` is then the deepest's, and the forward
    ends there, unless a wrapper (DDP, FSDP, DeepSpeed) has to see the end of it.

    Padding changes nothing: rows padded on the left are moved to the left for the model, so that its absolute positions
    count from their first real token.

    Raises ValueError for bad positions, batches or layers, and for rows that the model would score in another way than
    alone (`CausalLM.check_lengths`); TypeError for a model without an LM head, RuntimeError for a model compiled in
    place together with its head (or layers), or one that does not call its head exactly once.
    """
    lm = CausalLM.of(model)
    inputs, rows, targets, sequence_ids = place(lm, batch, positions)
    numbers = {layer: layer_number(lm, layer) for layer in layers}
    last = None if through_head or not numbers else max(numbers.values())
    tap = Tap(lm, numbers.values(), last)
    tap.run(inputs)
    states = {number: tap.at(number, rows, batch["input_ids"].shape) for number in {tap.last, *numbers.values()}}
    hidden = states[tap.last]
    return Supervised(
        hidden,
        targets.to(hidden.device),
        sequence_ids.to(hidden.device),
        len(batch["input_ids"]),
        {layer: states[number] for layer, number in numbers.items()},
    )


def supervised_logits(model: nn.Module | CausalLM, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the head layer gives at the positions that count, as rows of their samples: (B, S, V), and targets (B, S).

    Behind a row's last position its targets are -100. For hooks of the layers, such as ghost norms, which see neither
    rows without samples nor a head that is not called; what the model does to logits afterwards is the caller's.
    Raises what `supervised_hidden` raises.
    """
    lm = CausalLM.of(model)
    supervised = supervised_hidden(lm, batch)
    states, tokens, ids = supervised.hidden, supervised.targets, supervised.sequence_ids
    where = ids, torch.arange(len(tokens), device=tokens.device) - torch.searchsorted(ids, ids)
    shape = supervised.num_sequences, int(where[1].max()) + 1
    hidden = states.new_zeros(*shape, states.size(-1)).index_put(where, states)
    return lm.head_layer(hidden), tokens.new_full(shape, IGNORE_INDEX).index_put(where, tokens)


def supervised_stats(
    model: nn.Module | CausalLM,
    batch: Mapping[str, Tensor],
    outputs: str | Sequence[str] = ("logp",),
    *,
    positions: Positions = "supervised",
    reference: tuple[Tensor, Head] | None = None,
    **options: Any,
) -> tuple[TokenStats, Supervised]:
    """Statistics of every position that counts: `linear_token_stats` of `supervised_hidden` and the model's head.

    reference: (hidden (N, H'), head) of the frozen reference at the same positions: from `supervised_hidden`
    and `CausalLM.read_head` of a live model, or from a `ReferenceCache`. options: budget_bytes, k, backend of
    `linear_token_stats`; temperature, which divides the logits that the models make.

    Returns statistics of shape (N,) and the positions they belong to. Raises what those functions and
    `CausalLM.check_head` raise, and ValueError if the reference's rows or its head's softcap or temperature do not fit.
    """
    lm = CausalLM.of(model)
    if (parts := parts_of(lm)) is not None:
        if reference is not None:
            raise ValueError(f"{lm.name}: its logits are of two models, which take no reference beside them")
        options.pop("budget_bytes", None)
        return combined_stats(*parts, batch, outputs, positions, options)
    lm.check_head()
    supervised = supervised_hidden(lm, batch, positions)
    head = lm.read_head()  # after the forward: sharded models have gathered it by then
    hidden, targets = supervised.hidden, supervised.targets
    return head_stats(head, hidden, targets, outputs, reference=reference, **options), supervised


def combined_stats(
    base: CausalLM,
    reinforced: CausalLM,
    strength: float,
    batch: Mapping[str, Tensor],
    outputs: str | Sequence[str],
    positions: Positions,
    options: Mapping[str, Any],
) -> tuple[TokenStats, Supervised]:
    """`supervised_stats` of the logits that two models make together: of PIECE of them at a time."""
    supervised = supervised_hidden(base, batch, positions)
    pieces = [
        token_stats(logits, targets, outputs, ignore_index=-1, **options)
        for logits, targets in combined_logits(base, reinforced, strength, supervised, batch, positions)
    ]
    names = pieces[0].as_dict()
    values = {name: torch.cat([piece.as_dict()[name] for piece in pieces]) for name in names}
    return TokenStats(values, torch.cat([piece.mask for piece in pieces]), pieces[0].declined), supervised


def combined_logits(
    base: CausalLM,
    reinforced: CausalLM,
    strength: float,
    supervised: Supervised,
    batch: Mapping[str, Tensor],
    positions: Positions = "supervised",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (n, V), targets (n,)) of the positions that count, PIECE numbers of logits at a time, one piece at least.

    supervised: what the base makes of the batch."""
    states = supervised.hidden, supervised_hidden(reinforced, batch, positions).hidden
    heads = []
    for lm, hidden in zip((base, reinforced), states, strict=True):
        lm.check_head()
        heads.append(lm.read_head().merged().to(hidden))
    rows = max(1, PIECE // heads[0].weight.size(0))
    for at in range(0, max(1, len(supervised.targets)), rows):
        one, other = (head.logits(hidden[at : at + rows]) for head, hidden in zip(heads, states, strict=True))
        yield combine(one, other, strength), supervised.targets[at : at + rows]


def length_batches(lengths: Sequence[int], batch_size: int, counts: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in batches of similar length, longest first: memory runs out at once or never.

    counts: how many samples each index stands for (None: one), of which a batch has at most batch_size.
    Raises ValueError for batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: needs a whole number >= 1")
    batches: list[list[int]] = []
    left = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        count = 1 if counts is None else counts[i]
        if count > left:
            batches.append([])
            left = batch_size
        batches[-1].append(i)
        left -= count
    return batches


def check_finite(logp: Tensor, sequence_ids: Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError that names those of `rows` that have a log-probability (N,) which is not finite.

    NaN and infinite logits leave such; sequence_ids: (N,), places in `rows`.
    """
    bad = sequence_ids[~logp.isfinite()].unique().tolist()
    if bad:
        raise ValueError(f"model: non-finite log-probabilities among rows {sorted(rows[i] for i in bad)}")


def place(
    lm: CausalLM, batch: Mapping[str, Tensor], positions: Positions
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """What the model is given, and `select_positions`, whose rows are those of what it is given.

    Before a forward: the syncs of it find a short GPU queue.
    """
    rows, targets, sequence_ids = select_positions(batch, positions)
    inputs, places = _align(lm, batch, positions in PADDED)
    inputs = {name: value for name, value in inputs.items() if name not in NOT_MODEL_INPUTS}
    return inputs, rows if places is None else places[rows], targets, sequence_ids


def _real(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(B, T) bool: which tokens are no padding; None where all count. A mask may begin with tokens in a cache."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() > 2:  # 4-d: the caller says who sees whom
        return None
    ids = batch["input_ids"]
    if mask.dim() != 2 or len(mask) != len(ids) or mask.size(1) < ids.size(1):
        raise ValueError(
            f"batch['attention_mask']: needs the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    return mask[:, -ids.size(1) :] != 0


def _align(lm: CausalLM, batch: Mapping[str, Tensor], padding_counts: bool) -> tuple[Mapping[str, Any], Tensor | None]:
    """What the model is given: every row from its first real token on; and where each of the B*T positions is there.

    None where nothing has moved. A real token does not see padding on the right, so that float64 models get no mask:
    transformers' is -inf in its float32 softmax, and what would look at nothing but padding is NaN. Where padding
    counts they get it: what the model says of padding is what it says without looking at padding.
    """
    real, ids = _real(batch), batch["input_ids"]
    if real is None or batch["attention_mask"].shape != ids.shape:
        lm.check_lengths(ids.new_full((len(ids),), ids.size(1)), ids.size(1))
        return batch, None
    length, column = ids.size(1), torch.arange(ids.size(1), device=ids.device)
    first, count = real.int().argmax(1, keepdim=True), real.sum(1, keepdim=True)
    lm.check_lengths(count, length)
    block = (column >= first) & (column < first + count)
    start, gaps = torch.stack([first.amax(), (block != real).any().long()]).tolist()
    inputs = dict(batch)
    if not (gaps or padding_counts) and lm.inner.get_input_embeddings().weight.dtype == torch.float64:
        del inputs["attention_mask"]
    if not start:
        return inputs, None
    source = torch.arange(len(ids), device=ids.device).unsqueeze(1), (column + first) % length
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            inputs[name] = value[source]
    return inputs, (source[0] * length + (column - first) % length).flatten()


def _tensor(batch: Mapping[str, Tensor], name: str, shape: torch.Size | None = None) -> Tensor:
    value = batch.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"batch[{name!r}]: needs a tensor, got {type(value).__name__}; the batch has {sorted(batch)}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"batch[{name!r}]: needs the shape of input_ids {tuple(shape)}, got {tuple(value.shape)}")
    return value
