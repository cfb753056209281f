"""Arithmetic on the weights of two models of one shape, tensor by tensor: one of them in memory, the other on disk."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..ops.parameters import canonical


@torch.no_grad()
def negate(model: nn.Module, folder: Path, strength: float) -> float:
    """Task-vector negation: every weight w of `model`, in place, is w - a (w_r - w), w_r the model's in the folder.

    strength: a; 0 leaves each bit as it is. Computed in float32 at least, rounded to the weight's dtype. Returns the
    mean absolute change of a weight. Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023; Shi et al., MUSE.

    Raises ValueError that names a weight which the folder's files lack or have in another shape: before any is changed.
    """
    total, count = 0.0, 0
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(str(path), framework="pt")) for path in sorted(folder.glob("*.safetensors"))
        ]
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        pairs = [(weight, one_of(names, weight, stored, folder)) for weight, names in all_names(model)]
        for weight, name in pairs:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            change = strength * (stored[name].get_tensor(name).to(wide) - wide)
            weight.copy_(wide - change)
            total += float(change.abs().sum(dtype=torch.float64))
            count += weight.numel()
    return total / max(count, 1)


@torch.no_grad()
def negate_adapter(adapted: nn.Module, strength: float) -> float:
    """The same of a model under peft with plain LoRA, whose base is w: what the adapter adds, in place, times -a.

    Returns the mean absolute change of a weight of the factors. Raises ValueError for an adapter with other parts.
    """
    total, count = 0.0, 0
    for name, weight in adapted.named_parameters():
        if re.search(r"\.(modules_to_save|lora_magnitude_vector)\.|\.bias$", name) and weight.requires_grad:
            raise ValueError(
                f"{name}: is no factor of plain LoRA, which alone can be negated; leave it out of model.lora"
            )
        if re.search(r"\.(lora_B|lora_embedding_B)\.", name):
            total += float((weight * (1 + strength)).abs().sum(dtype=torch.float64))
            weight.mul_(-strength)
            count += weight.numel()
    return total / max(count, 1)


def all_names(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Every parameter once, with all that it is called."""
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), (weight, []))[1].append(canonical(name))
    return list(names.values())


def one_of(names: list[str], weight: Tensor, stored: dict[str, Any], folder: Path) -> str:
    """Under which of its names a weight is in the files."""
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise ValueError(f"{folder}: its files have no {names[0]}; needs a model of the same kind, by the same names")
    shape = tuple(stored[name].get_slice(name).get_shape())
    if shape != tuple(weight.shape):
        raise ValueError(f"{folder}: {name} has shape {shape}, needs that of the model, {tuple(weight.shape)}")
    return name
