"""TRL's trainers with per-token numbers from `linear_token_stats`:

    with accelerate_trl():
        trainer.train()  # DPO, KTO, GRPO and whatever else scores tokens by TRL's fused head

TRL's own losses stay. Its models score tokens in one place, a fused LM head, whose kernel gives log-probabilities,
entropies, mean logits and whether the label is the most likely token; inside, ours takes that kernel's place. Where TRL
has no Triton for a device, as on a CPU, it scores every position and drops prompts and padding afterwards; ours scores
what counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._hints import check_known
from ..ops import linear_token_stats

KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # what trl.trainer.utils calls: its kernel, and whether to
# leave out the positions that do not count
PARAMETERS = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
              "logit_scale", "outputs")  # fmt: skip
OUTPUTS: dict[str, tuple[str, ...]] = {  # of TRL's kernel, in its order, from ours
    "log_probs": ("logp",),
    "entropy": ("entropy",),
    "log_sum_sq_probs": (),
    "mean_logits": ("lse", "uniform_ce"),
    "is_top1": ("greedy",),
}
HAS = tuple(name for name, ours in OUTPUTS.items() if ours)
TESTED = "1.16.0"  # TRL's release that the tests compare with


@contextmanager
def accelerate_trl(**options: Any) -> Iterator[None]:
    """Inside, TRL's fused LM heads, of all its trainers in this process, are computed by `linear_token_stats`.

    Losses, gradients and metrics are TRL's, to rounding. options: budget_bytes and backend of `linear_token_stats`.

    Raises ImportError without trl; RuntimeError where its release scores tokens in another way; in a training,
    ValueError for what has no such number here (DPO's use_weighting).
    """
    try:
        from trl.trainer import utils
    except ImportError as error:
        raise ImportError(f"accelerate_trl: needs trl: {error}; pip install 'pyunlearn[integrations]'") from error
    theirs = {name: getattr(utils, name, None) for name in (KERNEL, COMPACT)}
    kernel = getattr(theirs[KERNEL], "forward", None)
    found = tuple(inspect.signature(kernel).parameters) if kernel is not None else None
    if found != PARAMETERS or not callable(theirs[COMPACT]):
        raise RuntimeError(
            f"trl {version('trl')}: {utils.__name__} needs {COMPACT} and {KERNEL} of {PARAMETERS[1:]}, as in {TESTED}, "
            f"got {'none' if found is None else found[1:]}"
        )

    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        return token_numbers(*args, **options)

    setattr(utils, KERNEL, SimpleNamespace(apply=apply))
    setattr(utils, COMPACT, lambda device: True)
    try:
        yield
    finally:
        for name, own in theirs.items():
            setattr(utils, name, own)


def token_numbers(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = HAS,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """`OUTPUTS` of hidden states (N, H) at targets (N,), float32 (N,) each; None where not asked for.

    Logits are softcap * tanh(logit_scale * x / softcap) / temperature, x = hidden @ weight.T + bias, computed in the
    dtype of autocast where it is on. chunk_size: of TRL's kernel, unused; `budget_bytes` is ours.
    """
    for name in outputs:
        check_known("outputs", name, HAS)
    if not logit_scale > 0:
        raise ValueError(f"logit_scale={logit_scale}: needs a number > 0")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wanted = ("log_probs", *(name for name in outputs if name != "log_probs"))
    with torch.autocast(device, enabled=False):
        stats = linear_token_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            bias=None if bias is None else bias.to(dtype),
            outputs=[ours for name in wanted for ours in OUTPUTS[name]],
            temperature=temperature / logit_scale,  # c tanh(s x / c) = s (c/s) tanh(x / (c/s))
            softcap=None if softcap is None else softcap / logit_scale,
            ignore_index=-100,
            **options,
        )
    numbers = stats.as_dict()
    if "mean_logits" in wanted:
        numbers["mean_logits"] = (numbers["lse"] - numbers["uniform_ce"]).detach()
    named = {"log_probs": "logp", "entropy": "entropy", "mean_logits": "mean_logits", "is_top1": "greedy"}
    return tuple(numbers[named[name]] if name in wanted else None for name in OUTPUTS)
