"""A causal LM taken apart once: the model inside its wrappers, its blocks, its head, its device and its context."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..distributed import is_fsdp, is_sharded, whole
from .head import Head, head_parts, logit_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENSES = re.compile("vision|image|video|audio|speech|vq")  # parts of a configuration that are not of text
WRAPPED = ("module", "_fsdp_wrapped_module")  # where DDP and the like, and FSDP1, hold their model
_PROVEN: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # model -> of which head its logits are known to be


class UnknownHeadError(ValueError):
    """A causal model whose logits are not made as `CausalLM.read_head` says."""


class CausalLM:
    """A transformers causal LM, plain or in DistributedDataParallel, FSDP, DeepSpeed, accelerate, peft, torch.compile.

    given: the module as it was passed. called: what a forward runs: `given`, of `torch.compile(model)` the original
    (compile its decoder: `model.get_decoder().compile()`). alone: without what DDP and the like do around a forward;
    adapters stay. inner: the transformers model, its adapters' wrapper seen through too.

    What a model may lack (a head, a list of blocks) is looked up, and raises, when it is asked for.
    Raises TypeError for a module without `get_output_embeddings`, and what `check_causal` raises.
    """

    def __init__(self, given: nn.Module):
        self.given = given
        self.called: nn.Module = given._modules.get("_orig_mod") or given  # not getattr: wrappers pass attributes on
        alone: Any = self.called
        while "_orig_mod" in alone._modules or not hasattr(alone, "get_output_embeddings"):
            alone = alone._modules.get("_orig_mod") or getattr(alone, "module", None)
            if not isinstance(alone, nn.Module):
                raise TypeError(
                    f"model: needs a transformers causal LM (get_output_embeddings), got {type(given).__name__}"
                )
        self.alone: Any = alone
        self.inner: Any = without_adapters(alone)
        check_causal(getattr(self.inner, "config", None), self.name)

    @classmethod
    def of(cls, model: nn.Module | CausalLM) -> CausalLM:
        """`model` taken apart; itself where it is."""
        return model if isinstance(model, CausalLM) else cls(model)

    @property
    def name(self) -> str:
        """Of its class, for errors."""
        return type(self.inner).__name__

    @property
    def config(self) -> Any:
        """The configuration of its text model."""
        config = self.inner.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def device(self) -> torch.device:
        """Where token ids have to be: the device of the input embeddings."""
        return self.inner.get_input_embeddings().weight.device

    @cached_property
    def depth(self) -> int:
        """D, the number of blocks."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The D blocks. Raises TypeError where there is no list of them."""
        for module in self.inner.modules():  # outer before inner: not the experts of a block
            if isinstance(module, nn.ModuleList) and len(module) == self.depth:
                return module
        raise TypeError(f"{self.name}: needs a ModuleList of its {self.depth} layers, to read hidden states of one")

    @cached_property
    def wrapped(self) -> bool:
        """Whether DDP, DeepSpeed or the like is around it and has to see the end of a forward."""
        return any(name in self.called._modules for name in WRAPPED)

    @cached_property
    def sharded(self) -> bool:
        """Whether FSDP2 (`fully_shard`) has it or parts of it."""
        return is_fsdp(self.called)

    # ---- its tokens --------------------------------------------------------------------------------------------------

    @property
    def context_length(self) -> int | None:
        """The longest sequence it takes, in tokens, from its configuration; None where it states none."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Rows of its input embeddings; a few may be spare."""
        return self.inner.get_input_embeddings().num_embeddings

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if the tokenizer makes an id that the model has no embedding for; spare rows are fine."""
        token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if largest >= self.vocab_size:
            raise ValueError(
                f"tokenizer and model do not fit: the tokenizer makes ids up to {largest} ({token!r}), the model has "
                f"{self.vocab_size} embedding rows; load the tokenizer that belongs to the model, or resize its "
                "embeddings"
            )

    def check_lengths(self, lengths: Tensor, longest: int) -> None:
        """Raises ValueError if rows of these lengths, padded to `longest` tokens, are scored in another way than alone.

        Rotary factors may be taken for a batch's longest row: "longrope" has two sets, "dynamic" one a length, which
        shorter rows of later batches keep.
        """
        for kind, limit in rotary_limits(self.config):
            if longest > limit and ("dynamic" in kind or int(lengths.min()) <= limit):
                raise ValueError(
                    f"{self.name}: its rotary factors ({kind}) are others for the rows of a batch that has "
                    f"{longest} tokens than for each row alone; needs "
                    + (f"at most {limit} tokens" if "dynamic" in kind else f"rows all above {limit} tokens, or none")
                    + "; make batches of one row, without padding" * ("dynamic" not in kind)
                )

    # ---- its head ----------------------------------------------------------------------------------------------------

    @property
    def head_layer(self) -> nn.Module:
        """What it calls for its logits. Raises TypeError where there is none."""
        layer = self.inner.get_output_embeddings()
        if layer is None:
            raise TypeError(f"{self.name}: has no LM head (get_output_embeddings() is None), needs a causal LM")
        return layer

    def read_head(self) -> Head:
        """The head as it stands, with what the model's `forward` does to the logits afterwards (`logit_settings`).

        Under peft it may have plain LoRA or be a copy (modules_to_save); under tensor parallelism its weight is a
        DTensor. To be called after the forward, which may unshard weights and take merged adapters out. That the
        model's logits are those of this head is proved by `check_head`.

        Raises TypeError without a head, or if it is none of these and no plain `nn.Linear` with its whole weight at
        hand.
        """
        weight, bias, lora = head_parts(self.head_layer, self.name)
        if weight.dim() != 2 or not weight.is_floating_point() or (is_sharded(weight) and self.sharded):
            raise TypeError(
                f"{self.name}: the head's weight needs to be a whole floating point (V, H) matrix, "
                f"got {type(weight).__name__} {tuple(weight.shape)} {weight.dtype}; leave the head unquantised "
                "and, in sharded training, in the root FSDP group (gathered until the backward) or out of ZeRO-3"
            )
        return Head(weight, bias, *logit_settings(self.config), lora)

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares `read_head` with the logits the model itself makes for two tokens: a few ms, once a model.

        Raises UnknownHeadError, a ValueError, if they differ: the architecture, or a head of a class of its own, does
        something to its logits that is not known here; ValueError for a model that is not causal: one whose logits of a
        token change with the next token.
        """
        forward = getattr(self.inner.forward, "__func__", self.inner.forward)
        proof = (id(self.head_layer), id(forward), *logit_settings(self.config))
        if _PROVEN.get(self.inner) == proof:
            return
        calls: list[tuple[Tensor, Tensor]] = []
        hook = self.head_layer.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
        try:
            with eval_mode(self.alone):
                ids = torch.tensor([[0, 1], [0, 0]], device=self.device)
                mask = torch.ones_like(ids)
                logits = self.alone(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        finally:
            hook.remove()
        if len(calls) != 1:
            raise UnknownHeadError(
                f"{self.name}: its forward needs to call its output layer once, it called it {len(calls)} times; use "
                "token_stats on model(...).logits"
            )
        hidden, computed = map(whole, calls[0])
        head = self.read_head().to(computed)  # under autocast it computes in half precision whatever its weights are
        ours = head.logits(hidden.to(computed)).float()
        tolerance = 1e-3 if torch.finfo(computed.dtype).bits >= 32 else 3e-2
        # A model that has diverged to NaN is not this function's business.
        scale = float(logits.nan_to_num(0, 0, 0).abs().max())
        rounding = min(4 * torch.finfo(computed.dtype).eps, 2**-9) * scale  # one token's way twice: not even that
        if not torch.allclose(logits[0, 0], logits[1, 0], 0, rounding, equal_nan=True):
            raise ValueError(
                f"{self.name}: is not causal, its logits of a token change with the token after it; needs a model in "
                "which a token sees only those before it (some are so with is_decoder=True in their config)"
            )
        if ours.shape != logits.shape or not torch.allclose(ours, logits, 0, tolerance * scale, equal_nan=True):
            differ = f"shapes {tuple(logits.shape)} and {tuple(ours.shape)}"
            if ours.shape == logits.shape:
                at = int((ours - logits).abs().argmax())
                differ = f"{float(logits.flatten()[at]):.4g} and {float(ours.flatten()[at]):.4g}, say"
            raise UnknownHeadError(
                f"{self.name}: its logits are not those of its output layer's weight "
                f"({type(self.head_layer).__name__}) with softcap={head.softcap}, temperature={head.temperature:g}: "
                f"{differ}; statistics from hidden states would be wrong: use token_stats on model(...).logits"
            )
        _PROVEN[self.inner] = proof


def check_causal(config: Any, what: str) -> None:
    """Raises TypeError for the configuration of a model of transformers that is no causal LM of text.

    what: the model, for the error. One that transformers does not know is left to `check_head`.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        return
    kind = None
    others = [name for name in config.sub_configs if SENSES.search(name) and getattr(config, name, None) is not None]
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif others:
        kind = f"of more than text ({', '.join(others)})"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "an encoder, in which a token sees those after it (is_decoder=False)"
    if kind is not None:
        raise TypeError(f"{what}: its {type(config).__name__} is {kind}; needs a decoder-only causal LM of text")


def rotary_limits(config: Any) -> list[tuple[str, int]]:
    """(kind, L) of rotary embeddings whose factors change for rows of more than L tokens, in some of the layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    limits = []
    for each in by_layer:
        kind = str(each.get("rope_type"))
        if kind == "longrope" or "dynamic" in kind:
            original = each.get("original_max_position_embeddings") if kind == "longrope" else None
            limits.append((kind, int(original or config.max_position_embeddings)))
    return limits


def without_adapters(alone: Any) -> Any:
    """The transformers model inside peft, FSDP1 and DeepSpeed; another wrapper that passes attributes on is one."""
    inner = alone
    while not hasattr(type(inner), "get_output_embeddings"):
        if hasattr(type(inner), "get_base_model"):
            below = inner.get_base_model()
        else:
            below = next((inner._modules[name] for name in ("_orig_mod", *WRAPPED) if name in inner._modules), None)
        if below is None or below is inner or not hasattr(below, "get_output_embeddings"):
            return inner
        inner = below
    return inner


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
