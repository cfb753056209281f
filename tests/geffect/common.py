"""What the tests of geffect share: losses in float64 throughout, and the straight way to a G-effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.float64 import V


def ids_of(batch_size: int, seed: int, length: int = 9) -> Tensor:
    return torch.randint(3, V, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B,) mean negative log-likelihood of each sequence."""
    ids = batch["ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def nll(ids: Tensor, scale: float = 1.0) -> Callable[[nn.Module], Tensor]:
    return lambda model: scale * sample_losses(model, {"ids": ids}).mean()


def in_parts(ids: Tensor, scale: float = 1.0):
    """The same loss, a sequence at a time."""

    def losses(model):
        for row in ids.split(1):
            yield nll(row, scale)(model) / len(ids)

    return losses


def full_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss(model), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach()
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def straight(model: nn.Module, objective, metric) -> dict[str, float]:
    """Parameter -> dot product, from two whole gradients."""
    a, b = full_gradient(model, objective), full_gradient(model, metric)
    return {name: float((a[name].double() * b[name].double()).sum()) for name in a}
