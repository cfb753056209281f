"""The learning rate of an unlearning for which none is told: by what is trained, and how large it is."""

from __future__ import annotations

from typing import Any

from ..model.lora import count_parameters

LARGE = 1_000_000_000  # parameters, from which on a model counts as large
RATES = {"small": 5e-5, "large": 1e-5}  # of all weights, with AdamW
ADAPTER = 10  # times that of a LoRA adapter, whose factors begin at 0


def rate_for(model: Any) -> float:
    """Of a model under peft that of its adapter."""
    rate = RATES["large" if count_parameters(model)[1] >= LARGE else "small"]
    return rate * ADAPTER if hasattr(model, "peft_config") else rate
