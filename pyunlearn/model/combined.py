"""A model whose logits are made of two: v = v_base - a ReLU(v_reinforced - v_base), whenever it is asked.

The generic logits of Eldan and Russinovich (Who's Harry Potter?, 2023), as MUSE (Shi et al., 2024) has them at
inference. A folder of one holds combined.json (a), base/ and reinforced/ (a model each), and the tokenizer: no model by
itself, so that nothing loads the base alone by mistake.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from .._files import read_json, write_json
from .causal_lm import CausalLM

FILE: Final = "combined.json"
PARTS: Final = ("base", "reinforced")
REARRANGED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")  # of a cache


def combine(base: Tensor, reinforced: Tensor, strength: float) -> Tensor:
    """v, at least float32, of two models' logits (..., V). strength: a; 0 gives the base's."""
    wide = torch.promote_types(base.dtype, torch.float32)
    base, reinforced = base.to(wide), reinforced.to(base.device, wide)
    return base - strength * (reinforced - base).relu()


class Combined:
    """The mixin that gives a causal LM another's logits to be combined with (`make_combined`)."""

    base: Any  # the plain model, of the same weights
    reinforced: Any
    strength: float

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        for name in PARTS:
            getattr(self, name).save_pretrained(Path(folder) / name, **options)
        write_json(Path(folder) / FILE, {"strength": self.strength})


def make_combined(base: Any, reinforced: Any, strength: float) -> Any:
    """A model that shares the weights of both and generates as its base does, by the logits v.

    Raises ValueError for a strength that is negative or not finite, and for models of other vocabularies or devices.
    """
    if not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength={strength!r}: needs a finite number >= 0")
    sizes = [CausalLM.of(model).vocab_size for model in (base, reinforced)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the two models need one vocabulary, got {sizes[0]} and {sizes[1]} tokens")
    kind = type(base)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs["return_dict"] = True
        output, other = kind.forward(self, *args, **kwargs), reinforced(*args, **with_other_cache(self, kwargs))
        output.logits = combine(output.logits, other.logits, self.strength)
        for name, cache in list(output.items()):
            if name in other and hasattr(cache, "reorder_cache") and not hasattr(cache, "other"):
                bind(cache, other[name])
            elif name in other and name == "state" and cache is not None:
                output[name] = State(cache, other[name])
        if labels is not None:
            output.loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=sizes[0])
        return output

    made: Any = object.__new__(type(f"Combined{kind.__name__}", (Combined, kind), {"forward": forward}))
    made.__dict__.update(base.__dict__)
    for table in ("_modules", "_buffers", "_non_persistent_buffers_set"):
        made.__dict__[table] = base.__dict__[table].copy()
    made.__dict__["base"] = base  # no module of its own: its parts are
    made.reinforced = reinforced
    made.__dict__["strength"] = float(strength)
    bits = torch.tensor(float(strength), dtype=torch.float64).view(torch.int64)  # which no change of dtype rounds
    made.register_buffer("strength_bits", bits, persistent=False)  # so that fingerprints know it
    return made


def with_other_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the reinforced model's forward: a cache is that which goes with the base's."""
    from transformers import DynamicCache

    changed = dict(kwargs)
    for name, cache in kwargs.items():
        if hasattr(cache, "reorder_cache") and not hasattr(cache, "other"):
            bind(cache, DynamicCache(config=model.reinforced.config.get_text_config(decoder=True)))
        if hasattr(cache, "other"):
            changed[name] = cache.other
    return changed


class State(list[Any]):
    """The tensors that a recurrent model (RWKV) carries on, and the other model's."""

    def __init__(self, own: list[Any], other: Any):
        super().__init__(own)
        self.other = other


def bind(cache: Any, other: Any) -> None:
    """`other` goes with `cache`, and is rearranged as it is."""
    cache.other = other
    for name in REARRANGED:
        if hasattr(cache, name):
            setattr(cache, name, both(getattr(cache, name), getattr(other, name)))


def both(one: Any, two: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        two(*args, **kwargs)
        return one(*args, **kwargs)

    return call


def parts_of(model: nn.Module | CausalLM) -> tuple[CausalLM, CausalLM, float] | None:
    """(base, reinforced, a) of a combined model; None for any other."""
    inner = CausalLM.of(model).inner
    if not isinstance(inner, Combined):
        return None
    return CausalLM(inner.base), CausalLM(inner.reinforced), inner.strength


def find_combined(source: str) -> Path | None:
    """The folder, if it is one of a combined model."""
    return Path(source) if (Path(source) / FILE).is_file() else None


def strength_of(folder: Path) -> float:
    """a, of a folder. Raises ValueError that names the file if it has none."""
    settings = read_json(folder / FILE, "make the model again")
    value = settings.get("strength") if isinstance(settings, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{folder / FILE}: has strength={value!r}, needs a finite number >= 0; make the model again")
    return float(value)
