"""Which layer and which group a parameter counts for, from its name and place in the model."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from ..ops.parameters import canonical

PAPER = ("embed", "shallow", "middle", "deep", "lm_head")
Groups = str | Mapping[str, str | list[str]]


def layer_of(name: str) -> str:
    """The block a parameter is in ("model.layers.3"), or, outside of the blocks, the module that holds it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def assign_groups(model: nn.Module, names: list[str], groups: Groups) -> dict[str, list[str]]:
    """Group -> its parameters among `names` (trainable, in the model's order).

    "paper": embed, shallow, middle, deep, lm_head, those that have parameters. Block l of the D blocks is in third
    3 l // D; what comes after the blocks is deep (the final norm; the paper counts it as the last layer), its linear
    layers are lm_head; what comes before is embed. A tied embedding and head are one parameter, in embed.

    A mapping: group -> shell patterns ("model.layers.*.mlp.*") of names. A parameter may be in several groups or none.

    Raises:
        ValueError: a group without a trainable parameter, "paper" for a model without one list of blocks, or an unknown
            name. The message says which.
    """
    if isinstance(groups, str):
        if groups != "paper":
            raise ValueError(f"groups={groups!r}: needs 'paper' or a mapping from group to name patterns")
        return paper_groups(model, names)
    members = {}
    for group, patterns in groups.items():
        each = [patterns] if isinstance(patterns, str) else list(patterns)
        members[group] = [name for name in names if any(fnmatchcase(name, pattern) for pattern in each)]
        if not members[group]:
            raise ValueError(
                f"groups[{group!r}]={patterns!r}: matches no trainable parameter; names are like {names[0]!r}"
            )
    return members


def paper_groups(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    every = [canonical(name) for name, _ in model.named_parameters()]
    blocks = {name: block for name in every if (block := layer_of(name)).rpartition(".")[2].isdigit()}
    lists = {block.rpartition(".")[0] for block in blocks.values()}
    if len(lists) != 1:
        has = f"blocks in {sorted(lists)}" if lists else "no numbered blocks"
        raise ValueError(f"groups='paper': needs one list of blocks, the model has {has}; pass a mapping")
    order = list(dict.fromkeys(blocks.values()))
    first = min(every.index(name) for name in blocks)
    linear = {
        canonical(f"{path}.{name}")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[str, list[str]] = {group: [] for group in PAPER}
    for name in names:
        if name in blocks:
            groups[PAPER[1 + 3 * order.index(blocks[name]) // len(order)]].append(name)
        elif every.index(name) < first:
            groups["embed"].append(name)
        else:
            groups["lm_head" if name in linear else "deep"].append(name)
    return {group: members for group, members in groups.items() if members}
