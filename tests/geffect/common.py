"""What the tests of geffect share: losses in float64 throughout, and the straight way to a G-effect."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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


FORGET, RETAIN = ids_of(4, 1), ids_of(4, 2)
METRICS = {"unlearn": nll(FORGET), "retain": nll(RETAIN)}
OBJECTIVE = nll(FORGET, -1.0)


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


def state(model: nn.Module) -> list:
    return [
        (id(p.grad), None if p.grad is None else p.grad.clone(), p.requires_grad, bool(p._post_accumulate_grad_hooks))
        for p in model.parameters()
    ] + [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in model.modules()]


def same(a: list, b: list) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(tree_iter(a), tree_iter(b), strict=True)
    )


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once among storages that operations inside have made."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes
