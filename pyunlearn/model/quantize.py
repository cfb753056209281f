"""Weights of 4 or 8 bits under an adapter (QLoRA), by bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch


def check_quantize(kind: str) -> None:
    """Raises ImportError unless bitsandbytes is installed, ValueError without a GPU that it computes on.

    It takes the CPU too, but there its 4-bit layers, once they have run in evaluation mode, lose gradients silently.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"model.quantize={kind} needs the bitsandbytes package: pip install bitsandbytes")
    supported = {*getattr(importlib.import_module("bitsandbytes"), "supported_torch_devices", {"cuda"})} - {"cpu"}
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if here is None or here.type not in supported:
        raise ValueError(
            f"model.quantize={kind}: needs a GPU that bitsandbytes trains on ({', '.join(sorted(supported))}), here is "
            f"{here}; on a CPU it is for inference only: leave model.quantize out"
        )


def quantize_options(kind: str, dtype: str) -> dict[str, Any]:
    """What from_pretrained is given: nf4 is QLoRA's (its constants quantised too), int8 is LLM.int8().

    dtype: that it computes in.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=getattr(torch, dtype))}
