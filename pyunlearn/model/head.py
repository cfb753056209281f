"""The LM head of a causal LM: its weight, what adapters add, what the model does to its logits, statistics with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        weight, bias = plain(self.weight), plain(self.bias)
        for _, down, up, scaling in self.lora:
            weight = (weight + scaling * (up.weight @ down.weight)).to(weight.dtype)
        return self._replace(weight=weight, bias=bias, lora=())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) in plain torch: for checks, not for speed."""
        head = self.merged()
        x = nn.functional.linear(hidden, head.weight, head.bias)
        return (x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)) / self.temperature


def output_head(model: nn.Module) -> Head:
    """The LM head of a transformers causal LM, with what its `forward` does to the logits afterwards.

    Read from the configuration: softcaps (Gemma, RecurrentGemma, xLSTM), and as temperature `logits_scaling`
    (Granite divides by it, HyperCLOVA X multiplies), `logit_scale` (Cohere), `lm_head_multiplier` (Falcon H1)
    and, before the softcap, `output_multiplier`. `check_output_head` proves the result on a given model.

    Under peft the head may have plain LoRA or be a copy (modules_to_save); under tensor parallelism its weight
    is a DTensor. Call this after the forward, which may unshard weights and take merged adapters out.

    Raises TypeError without a head, or if it is none of these and no plain `nn.Linear` with its whole weight at hand.
    """
    inner = unwrap(model)
    weight, bias, lora = _head_parts(inner)
    if weight.dim() != 2 or not weight.is_floating_point() or (hasattr(weight, "full_tensor") and is_fsdp(inner)):
        raise TypeError(
            f"{type(inner).__name__}: the head's weight needs to be a whole floating point (V, H) matrix, "
            f"got {type(weight).__name__} {tuple(weight.shape)} {weight.dtype}; leave the head unquantised "
            "and, in sharded training, in the root FSDP group (gathered until the backward) or out of ZeRO-3"
        )
    config = text_config(inner)

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
    return Head(weight, bias, softcap, 1 / scale, lora)


@torch.no_grad()
def check_output_head(model: nn.Module) -> None:
    """Compare `output_head` with the logits the model itself makes for two tokens: a few ms, once a run.

    Raises ValueError if they differ: the architecture does something to its logits that is not known here.
    """
    inner = unwrap(model)
    kept: list[Tensor] = []
    hook = head_layer(inner).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        with eval_mode(inner):
            ids = torch.tensor([[0, 1]], device=model_device(inner))
            logits = inner(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    head = output_head(inner)
    ours = head.logits(plain(kept[0]).to(head.weight.dtype)).float()
    tolerance = 1e-3 if torch.finfo(head.weight.dtype).bits >= 32 else 3e-2
    # A model that has diverged to NaN is not this function's business.
    scale = float(logits.nan_to_num(0, 0, 0).abs().max())
    if ours.shape != logits.shape or not torch.allclose(ours, logits, 0, tolerance * scale, equal_nan=True):
        raise ValueError(
            f"{type(inner).__name__}: its logits are not those of its output layer with "
            f"softcap={head.softcap}, temperature={head.temperature:g}; statistics from hidden states would "
            "be wrong: use token_stats on model(...).logits"
        )


def head_stats(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    outputs: str | Sequence[str] = ("logp",),
    *,
    reference: tuple[Tensor, Head] | None = None,
    **options: Any,
) -> TokenStats:
    """`linear_token_stats` of hidden states (N, H) under a head with its bias, softcap and temperature.

    Arguments, result and errors as in `token_stats_of`.
    """
    hidden = hidden.to(head.weight.dtype)
    return linear_token_stats(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        outputs=outputs,
        reference=None if reference is None else _reference(reference, head, hidden),
        temperature=head.temperature,
        softcap=head.softcap,
        ignore_index=None,
        adapter=head.adapter(hidden),
        **options,
    )


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DDP and the like, to read attributes from. Raises TypeError if none."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings"):
        inner = getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(
                f"model: needs a transformers causal LM (get_output_embeddings), got {type(model).__name__}"
            )
    return inner


def model_device(model: nn.Module) -> torch.device:
    """Where token ids have to be: the device of the input embeddings."""
    return unwrap(model).get_input_embeddings().weight.device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside; every module's own train/eval state again afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def head_layer(inner: Any) -> nn.Module:
    """What the model calls for its logits."""
    layer = inner.get_output_embeddings()
    if layer is None:
        name = type(inner).__name__
        raise TypeError(f"{name}: has no LM head (get_output_embeddings() is None), needs a causal LM")
    return layer


def _head_parts(inner: Any) -> tuple[Tensor, Tensor | None, tuple[Lora, ...]]:
    """Weight, bias and LoRA of the head as it stands, by the names peft gives its attributes: no import needed."""
    layer: Any = head_layer(inner)
    called, lora = layer, tuple[Lora, ...]()
    if hasattr(layer, "modules_to_save"):
        active = [] if layer.disable_adapters else layer.active_adapters
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    if hasattr(layer, "lora_A"):
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        names = [name for name in active if name in layer.lora_A]
        if all(name not in layer.lora_variant and isinstance(layer.lora_A[name], nn.Linear) for name in names):
            kinds = (layer.lora_dropout, layer.lora_A, layer.lora_B, layer.scaling)
            lora = tuple(Lora(*(kind[name] for kind in kinds)) for name in names)
            layer = layer.base_layer
    if not isinstance(layer, nn.Linear):
        adapted = hasattr(called, "base_layer") or hasattr(called, "original_module")
        advice = "; of adapters only plain LoRA and modules_to_save: leave the head out of others' target_modules"
        raise TypeError(
            f"{type(inner).__name__}: its head is a {type(layer).__module__}.{type(layer).__name__}, needs a plain "
            f"nn.Linear with a (V, H) weight{advice if adapted else ''}"
        )
    bias: Tensor | None = layer.bias
    for _, _, up, scaling in lora:
        if up.bias is not None:
            bias = scaling * up.bias + (0 if bias is None else bias)
    return layer.weight, bias, lora


def text_config(inner: Any) -> Any:
    return inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config


def is_fsdp(model: nn.Module) -> bool:
    """Whether torch's fully_shard (FSDP2) has it or parts of it."""
    return any(hasattr(type(module), "set_reshard_after_forward") for module in model.modules())


def plain(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _reference(reference: tuple[Tensor, Head], head: Head, hidden: Tensor) -> tuple[Tensor, ...]:
    """(hidden, weight[, bias]) as `linear_token_stats` takes it, of the model's head's dtype and device."""
    ref_hidden, ref_head = reference[0], reference[1].merged()
    if ref_hidden.size(0) != hidden.size(0):
        raise ValueError(f"reference: needs {hidden.size(0)} rows, one a position, got {ref_hidden.size(0)}")
    if (ref_head.softcap, ref_head.temperature) != (head.softcap, head.temperature):
        raise ValueError(
            f"reference: its softcap and temperature {ref_head.softcap, ref_head.temperature} need to be the "
            f"model's, {head.softcap, head.temperature}"
        )
    tensors = (ref_hidden, ref_head.weight, ref_head.bias)
    return tuple(tensor.to(head.weight) for tensor in tensors if tensor is not None)
