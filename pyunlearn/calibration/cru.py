"""Component-wise replacement unlearning (CRU): of the unlearned model, the layers that forget at little cost.

From the AAAI 2026 tutorial Towards Reliable Evaluations of Machine Unlearning (On the Fragility of Latent Knowledge).
The modular influence of a component is what the ORIGINAL model says with that component alone taken from the unlearned
one: its utility and its forgetting. Components are ranked by both, the sum of the two ranks orders them, and the first
k come from the unlearned model, all others from the original.

The tutorial leaves open: ties (shared ranks; then the one of higher utility, then the shallower), the choice of k (best
utility among those that forget enough), and the tensors outside of what it names layers, which are one more component
here, `REST`: so k = 0 is the original and k = all of them the unlearned model, both to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from scipy.stats import rankdata
from torch import nn

from .._hints import check_known
from ..model.causal_lm import CausalLM
from ..model.tensors import Tensors, stored

KINDS = ("layer", "attention", "mlp", "norm")
REST = "rest"  # embeddings, head, final norm; of other kinds than layers, the rest of the layers too


def components(model: nn.Module | CausalLM, kind: str = "layer") -> dict[str, list[str]]:
    """Names of tensors (`stored`) by component: one a block, by its depth from 0 on, "layer 0", ..., and REST.

    kind: whole blocks, or of each block its attention, MLP or norms alone, told apart by their classes and names.
    Raises ValueError for an unknown kind, or one that the model's blocks do not have.
    """
    check_known("component", kind, KINDS)
    lm = CausalLM.of(model)
    places = {id(tensor): name for name, (tensor, _) in stored(lm.inner).items()}
    parts: dict[str, list[str]] = {}
    for depth, block in enumerate(lm.blocks):
        of_kind = (
            [block] if kind == "layer" else [each for name, each in block.named_children() if is_a(kind, name, each)]
        )
        own = {places[id(t)]: None for module in of_kind for t in module.state_dict(keep_vars=True).values()}
        if own:
            parts[f"{kind} {depth}"] = [*own]
    if not parts:
        raise ValueError(f"component={kind!r}: the blocks of {lm.name} have none; needs one of {', '.join(KINDS)}")
    taken = {name for names in parts.values() for name in names}
    return {**parts, REST: [name for name in places.values() if name not in taken]}


def is_a(kind: str, name: str, module: nn.Module) -> bool:
    """Whether a part of a block is of that kind."""
    own = f"{name} {type(module).__name__}".lower()
    if "norm" in type(module).__name__.lower():
        return kind == "norm"
    return kind == ("attention" if "att" in own else "mlp")


@torch.no_grad()
def load(model: nn.Module | CausalLM, tensors: Tensors, names: Sequence[str]) -> None:
    """Puts the tensors of these names into the model, in place, one at a time."""
    held = stored(CausalLM.of(model).inner)
    for name in names:
        tensor, every = held[name]
        tensor.copy_(tensors.read(every).to(tensor.dtype))


def changed(
    parts: Mapping[str, Sequence[str]], every: Mapping[str, Sequence[str]], before: Tensors, after: Tensors
) -> list[str]:
    """Components that differ in the two models; every: all names of each tensor, by its first."""
    return [
        part
        for part, names in parts.items()
        if any(not torch.equal(before.read(every[name]), after.read(every[name])) for name in names)
    ]


def influence_order(influence: Mapping[str, tuple[float, float]]) -> list[tuple[str, float]]:
    """(component, rank sum), the best first: what to take from the unlearned model, in its order.

    influence: (utility, forgetting) of each component's patch, higher is better in both, in the order of their depth.
    Ranks begin with 1, and those who tie share the mean of theirs; among equal sums the higher utility comes first, and
    then the shallower. Raises ValueError for NaN.
    """
    names = list(influence)
    if any(math.isnan(value) for pair in influence.values() for value in pair):
        raise ValueError(f"influence={dict(influence)}: needs numbers, got NaN")
    ranks = [rankdata([-influence[name][i] for name in names]) for i in (0, 1)]
    sums = {name: float(ranks[0][i] + ranks[1][i]) for i, name in enumerate(names)}
    order = sorted(range(len(names)), key=lambda i: (sums[names[i]], -influence[names[i]][0], i))
    return [(names[i], sums[names[i]]) for i in order]


def choose_count(curve: Sequence[tuple[float, float]], share: float) -> tuple[int, float]:
    """k, and the forgetting that was asked for: the k of the highest utility among those that forget enough.

    curve: (utility, forgetting) of the hybrid with the first k components unlearned, k = 0 (the original), 1, ..., all
    (the unlearned). Enough is `share` of what the unlearned model forgets, from the original on. Of equal utilities,
    the one that forgets more, then the smaller k.

    Raises ValueError for a share outside of (0, 1], a curve of fewer than 2, or an unlearned model that has not
    forgotten more than the original.
    """
    if not 0 < share <= 1:
        raise ValueError(f"target={share:g}: needs a share of what the unlearned model forgets, above 0 and 1 at most")
    if len(curve) < 2:
        raise ValueError(f"curve={list(curve)}: needs the original and the unlearned model at least")
    start, end = curve[0][1], curve[-1][1]
    if not end > start:
        raise ValueError(
            f"the unlearned model has forgotten nothing of the validation rows ({start:.4g} before, {end:.4g} after): "
            "there is nothing to choose layers by"
        )
    limit = end if share == 1 else start + share * (end - start)
    enough = [k for k, (_, forgetting) in enumerate(curve) if forgetting >= limit]
    return max(enough, key=lambda k: (*curve[k], -k)), limit
