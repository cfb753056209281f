"""The model of a trainer, which a training leaves as it was, but for its weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.causal_lm import CausalLM

PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")  # what accelerate sets, and takes back nowhere
SWITCHES = (
    *("training", "neftune_noise_alpha", "gradient_checkpointing", "_gradient_checkpointing_func"),
    *("_require_grads_hook", "_require_grads_hooks"),
)
HOOKS = ("neftune_post_forward_hook", "make_inputs_require_grads")  # transformers' own, on the input embeddings


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """For a training or an evaluation of `model`: whatever ends it, all but the weights is then as it was before.

    Train and eval modes, gradient checkpointing, noise on the embeddings, and what accelerate has put around `forward`.
    Inside, what it has put there for another trainer is gone, so that it prepares the model as this one is set.
    """
    lm = CausalLM.of(model)
    prepared = attributes(model, PREPARED)
    switches = [(module, attributes(module, SWITCHES)) for module in model.modules()]
    hooks: dict[int, Any] = lm.inner.get_input_embeddings()._forward_hooks
    known = set(hooks)
    if not lm.wrapped:  # DDP and the like would be put around once more
        own = {"forward": prepared.get("_original_forward", prepared.get("forward"))}
        restore(model, PREPARED, own if own["forward"] else {})
    try:
        yield
    finally:
        restore(model, PREPARED, prepared)
        for module, values in switches:
            restore(module, SWITCHES, values)
        for key in hooks.keys() - known:
            if getattr(hooks[key], "__name__", None) in HOOKS:  # a callable object has none
                del hooks[key]


@contextmanager
def random_as_found() -> Iterator[None]:
    """The global generators of Python, NumPy and torch (CPU and this process's GPU) are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def attributes(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the module itself, not of its class."""
    return {name: vars(module)[name] for name in names if name in vars(module)}


def restore(module: nn.Module, names: tuple[str, ...], values: dict[str, Any]) -> None:
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(values)
