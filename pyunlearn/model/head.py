"""The LM head of a causal LM: its weight, what adapters add, what the model does to its logits, statistics with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..ops import TokenStats, linear_token_stats

# Gemma; RecurrentGemma; xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Lora(NamedTuple):
    """What an adapter adds to the head: scaling * up(down(dropout(hidden)))."""

    dropout: nn.Module
    down: nn.Linear  # (r, H)
    up: nn.Linear  # (V, r)
    scaling: float


class Head(NamedTuple):
    """From hidden states to logits: softcap * tanh(x / softcap) / temperature, x = hidden @ weight.T + bias, + LoRA.

    softcap None: no tanh, x / temperature.
    """

    weight: Tensor  # (V, H), plain or sharded over the vocabulary
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    lora: tuple[Lora, ...] = ()

    def adapter(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """`adapter` of `linear_token_stats` for hidden (..., H): (..., r) and (V, r), r over all adapters, or None."""
        if not self.lora:
            return None
        x = [scaling * down(dropout(hidden.to(down.weight.dtype))) for dropout, down, _, scaling in self.lora]
        return torch.cat(x, -1).to(hidden.dtype), torch.cat([part.up.weight for part in self.lora], 1).to(hidden.dtype)

    @torch.no_grad()
    def merged(self) -> Head:
        """The same head as one plain matrix, for what takes no gradient: LoRA added in, shards gathered."""
        weight, bias = whole(self.weight), None if self.bias is None else whole(self.bias)
        for _, down, up, scaling in self.lora:
            weight = (weight + scaling * (up.weight @ down.weight)).to(weight.dtype)
        return self._replace(weight=weight, bias=bias, lora=())

    def to(self, like: Tensor) -> Head:
        """Weight and bias on the device and in the dtype of `like`."""
        bias = None if self.bias is None else self.bias.to(like.device, like.dtype)
        return self._replace(weight=self.weight.to(like.device, like.dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) in plain torch: for checks, not for speed."""
        head = self.merged()
        x = nn.functional.linear(hidden, head.weight, head.bias)
        return (x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)) / self.temperature


def logit_settings(config: Any) -> tuple[float | None, float]:
    """(softcap, temperature): what a model's `forward` does to its logits, as its text configuration says.

    Softcaps: Gemma, RecurrentGemma, xLSTM. As temperature: `logits_scaling` (Granite divides by it, HyperCLOVA X
    multiplies), `logit_scale` (Cohere), `lm_head_multiplier` (Falcon H1) and, before the softcap, `output_multiplier`.
    """

    def setting(name: str) -> float | None:
        value = getattr(config, name, None)
        return None if value is None else float(value)

    softcap = next(filter(None, map(setting, SOFTCAPS)), None)
    scale = (setting("logit_scale") or 1.0) * (setting("lm_head_multiplier") or 1.0)
    if scaling := setting("logits_scaling"):
        scale *= scaling if "hyperclovax" in config.model_type else 1 / scaling
    if multiplier := setting("output_multiplier"):
        scale *= multiplier
        # c tanh(m x / c) = m (c/m) tanh(x / (c/m))
        softcap = None if softcap is None else softcap / multiplier
    return softcap, 1 / scale


def head_stats(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    outputs: str | Sequence[str] = ("logp",),
    *,
    reference: tuple[Tensor, Head] | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> TokenStats:
    """`linear_token_stats` of hidden states (N, H) under a head with its bias, softcap and temperature.

    temperature: divides the model's logits, and the reference's. Other arguments, result and errors as in
    `supervised_stats`.
    """
    hidden = hidden.to(head.weight.dtype)
    return linear_token_stats(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        outputs=outputs,
        reference=None if reference is None else _reference(reference, head, hidden),
        temperature=head.temperature * temperature,
        softcap=head.softcap,
        ignore_index=None,
        adapter=head.adapter(hidden),
        **options,
    )


def head_parts(layer: Any, name: str) -> tuple[Tensor, Tensor | None, tuple[Lora, ...]]:
    """Weight, bias and LoRA of a head as it stands, by the names peft gives its attributes: no import needed.

    Raises TypeError where it is no `nn.Linear` at heart; name: of the model, for that.
    """
    called, lora = layer, tuple[Lora, ...]()
    if hasattr(layer, "modules_to_save"):
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if hasattr(layer, "lora_A"):
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        names = [adapter for adapter in active if adapter in layer.lora_A]
        if all(each not in layer.lora_variant and isinstance(layer.lora_A[each], nn.Linear) for each in names):
            kinds = (layer.lora_dropout, layer.lora_A, layer.lora_B, layer.scaling)
            lora = tuple(Lora(*(kind[each] for kind in kinds)) for each in names)
            layer = layer.base_layer
    if not isinstance(layer, nn.Linear):
        adapted = hasattr(called, "base_layer") or hasattr(called, "original_module")
        advice = "; of adapters only plain LoRA and modules_to_save: leave the head out of others' target_modules"
        raise TypeError(
            f"{name}: its head is a {type(layer).__module__}.{type(layer).__name__}, needs a plain "
            f"nn.Linear with a (V, H) weight{advice if adapted else ''}"
        )
    bias: Tensor | None = layer.bias
    for _, _, up, scaling in lora:
        if up.bias is not None:
            bias = scaling * up.bias + (0 if bias is None else bias)
    return layer.weight, bias, lora


def _reference(reference: tuple[Tensor, Head], head: Head, hidden: Tensor) -> tuple[Tensor, ...]:
    """(hidden, weight[, bias]) as `linear_token_stats` takes it, of the model's head's dtype and device."""
    ref_hidden, ref_head = reference[0], reference[1].merged().to(head.weight)
    if ref_hidden.size(0) != hidden.size(0):
        raise ValueError(f"reference: needs {hidden.size(0)} rows, one a position, got {ref_hidden.size(0)}")
    if (ref_head.softcap, ref_head.temperature) != (head.softcap, head.temperature):
        raise ValueError(
            f"reference: its softcap and temperature {ref_head.softcap, ref_head.temperature} need to be the "
            f"model's, {head.softcap, head.temperature}"
        )
    tensors = (ref_hidden.to(head.weight.device, head.weight.dtype), ref_head.weight, ref_head.bias)
    return tuple(tensor for tensor in tensors if tensor is not None)
