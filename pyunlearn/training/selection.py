"""Which parameters a training moves, by regular expressions over their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._hints import near
from ..ops.parameters import canonical
from .settings import TrainingConfig


def trainable(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of those that require gradients, tied ones once."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


@contextmanager
def selected(model: Any, settings: TrainingConfig) -> Iterator[None]:
    """Inside, only the parameters that `settings.train_only` matches require gradients, or all but those that
    `settings.freeze` matches, of those that did before; they do so again afterwards.

    Raises ValueError as `trained_names`.
    """
    names = trained_names(model, settings)
    frozen = [weight for name, weight in model.named_parameters() if weight.requires_grad and name not in names]
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)


def trained_names(model: Any, settings: TrainingConfig) -> set[str]:
    """The parameters that a training by these settings moves, by their names in the model; tied ones by the first.

    A pattern has to match a whole name, of a tied parameter any of its names; wrappers' parts do not count.

    Raises ValueError for a pattern that matches no parameter of those that are trained, naming the nearest, and where
    none is left to train.
    """
    names: dict[int, list[str]] = {}  # by parameter: as it is called, then all that it may be called
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            names.setdefault(id(weight), [name]).append(canonical(name))
    matched: set[int] = set()
    key = "freeze" if settings.train_only is None else "train_only"
    patterns = getattr(settings, key) or []
    for pattern in patterns:
        found = {place for place, known in names.items() if any(re.fullmatch(pattern, name) for name in known[1:])}
        if not found:
            every = [name for known in names.values() for name in known[1:]]
            like = near(pattern, every) or every[:3]
            raise ValueError(
                f"{settings.section}.{key}={pattern!r}: matches no parameter that is trained, needs a regular "
                f"expression of whole names; the nearest are {', '.join(like)}"
            )
        matched |= found
    kept = [place for place in names if (place in matched) == (key == "train_only")]
    if not kept:
        raise ValueError(f"{settings.section}.{key}={patterns}: freezes every parameter; needs some left to train")
    return {names[place][0] for place in kept}
