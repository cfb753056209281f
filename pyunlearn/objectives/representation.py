"""Objectives on the hidden states of one layer: misdirect them on the forget set, retain them on the rest.

The option `layer` says whose: "shallow", "middle" and "deep" are blocks D // 3, 2 D // 3 and D of D, as in the
G-effect paper; a number is transformers' index into `hidden_states`, so that 1 is the first block's output and D (or
-1) what the LM head gets. Functions take the states as they are; who captures them (`pyunlearn.model.forward`, the
trainer) reads the option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from .definition import Layer, NonNegative, Seed
from .forget import G_EFFECT
from .objective import Objective
from .registry import register, register_preset

WMDP = "Li et al., The WMDP Benchmark, ICML 2024"
EIGHTH = 8  # block: model.layers[7], whose output both code bases take
PLAIN = ("paper", "wmdp_paper")  # presets that sum over H; those of code bases are means over H
BY_SIZE = ("g_effect_code", "uwc_code", "wmdp", "open_unlearning")


@lru_cache(maxsize=16)
def direction(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """u ~ U[0, 1)^size: the same float32 numbers for every dtype and device. Not to be written to."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def target(hidden: Tensor, c: float, seed: int, norm: bool = False) -> Tensor:
    """c u, or c u / ||u||."""
    u = direction(hidden.size(-1), seed, hidden.device, hidden.dtype)
    return c * (u / u.norm() if norm else u)


@register(
    "rmu",
    paper_reduction="sequence_token_mean",
    formula="mean of ||h_t - c u||^2, u ~ U[0, 1)^H drawn once from `seed`",
    source=f"{WMDP}, Section 4; {G_EFFECT}, Eq. 8",
)
def rmu(hidden: Tensor, *, c: NonNegative = 2.0, layer: Layer = "middle", seed: Seed = 0) -> Tensor:
    """Representation misdirection: the forget set's hidden states move to one random vector.

    The plain square, on the scale of `rr`: with equal weights the two are Eq. 8 + Eq. 19. Code bases divide by H (the
    presets, each with `rr`'s of the same name): coefficient 1 there is 1/H here. Of one run the two need one scale, and
    `rr` a layer of `rmu`'s.

    c and `layer` matter much; the G-effect paper has c = 4 at layer 9 of Phi-1.5 and c = 2 at layer 21 of Llama-2-7B.
    u depends on `seed` and H alone, so that a resumed run has the same one. `wmdp` and `open_unlearning` make it a unit
    vector (as `wmdp_paper` does, on the plain scale), and take what `model.layers[7]` gives, layer 8 here.
    OpenUnlearning's loss is meant as the mean over sequences of their token mean; its broadcasting multiplies the mean
    of sums by the mean of 1/n instead, which is 4/3 of that for equal losses at 2 and 6 tokens, and depends on how a
    step is split. It reads the supervised tokens' own states, here as everywhere those that predict them.

    >>> rmu(torch.zeros(1, 3, 8), c=0.0)
    tensor(0.)
    """
    return (hidden - target(hidden, c, seed)).square().sum(-1)


@register_preset("rmu", "g_effect_code", "uwc_code", formula="mean of ||h_t - c u||^2 / H")
def rmu_g_effect_code(hidden: Tensor, *, c: NonNegative = 2.0, layer: Layer = "middle", seed: Seed = 0) -> Tensor:
    return (hidden - target(hidden, c, seed)).square().mean(-1)


@register_preset(
    "rmu",
    "wmdp_paper",
    formula="mean of ||h_t - c u / ||u|| ||^2",
)
def rmu_wmdp_paper(hidden: Tensor, *, c: NonNegative = 6.5, layer: Layer = EIGHTH, seed: Seed = 0) -> Tensor:
    return (hidden - target(hidden, c, seed, norm=True)).square().sum(-1)


@register_preset(
    "rmu",
    "wmdp",
    formula="mean over all positions, prompt and padding too, of ||h_t - c u / ||u|| ||^2 / H",
    positions="all",
)
def rmu_wmdp(hidden: Tensor, *, c: NonNegative = 20.0, layer: Layer = EIGHTH, seed: Seed = 0) -> Tensor:
    return (hidden - target(hidden, c, seed, norm=True)).square().mean(-1)


@register_preset(
    "rmu",
    "open_unlearning",
    formula="mean over sequences of the sum of ||h_t - c u / ||u|| ||^2 / H, times the batch's mean of 1/n",
    reduction="sequence_mean",
)
def rmu_open_unlearning(
    hidden: Tensor, *, inverse_length: Tensor, c: NonNegative = 2.0, layer: Layer = EIGHTH, seed: Seed = 0
) -> Tensor:
    return inverse_length * rmu_wmdp(hidden, c=c, layer=layer, seed=seed)


@register(
    "rr",
    role="retain",
    paper_reduction="sequence_token_mean",
    formula="mean of ||h_t - h°_t||^2",
    source=f"{G_EFFECT}, Eq. 19; {WMDP}, Section 4",
)
def rr(hidden: Tensor, ref_hidden: Tensor, *, layer: Layer = "middle") -> Tensor:
    """Representation retention: hidden states on the retain set stay where the reference has them.

    Not divided by H, like `rmu`; the presets are, as those of `rmu` with the same name.

    >>> rr(torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    tensor(8.)
    """
    return (hidden - ref_hidden).square().sum(-1)


@register_preset("rr", "g_effect_code", "uwc_code", formula="mean of ||h_t - h°_t||^2 / H")
def rr_g_effect_code(hidden: Tensor, ref_hidden: Tensor, *, layer: Layer = "middle") -> Tensor:
    return (hidden - ref_hidden).square().mean(-1)


@register_preset("rr", "wmdp_paper", formula="mean of ||h_t - h°_t||^2")
def rr_wmdp_paper(hidden: Tensor, ref_hidden: Tensor, *, layer: Layer = EIGHTH) -> Tensor:
    return (hidden - ref_hidden).square().sum(-1)


@register_preset(
    "rr",
    "wmdp",
    formula="mean over all positions, prompt and padding too, of ||h_t - h°_t||^2 / H",
    positions="all",
)
def rr_wmdp(hidden: Tensor, ref_hidden: Tensor, *, layer: Layer = EIGHTH) -> Tensor:
    return (hidden - ref_hidden).square().mean(-1)


@register_preset(
    "rr",
    "open_unlearning",
    formula="mean over sequences of the sum of ||h_t - h°_t||^2 / H, times the batch's mean of 1/n",
    reduction="sequence_mean",
)
def rr_open_unlearning(hidden: Tensor, ref_hidden: Tensor, *, inverse_length: Tensor, layer: Layer = EIGHTH) -> Tensor:
    return inverse_length * rr_wmdp(hidden, ref_hidden, layer=layer)


def pairs_of(objectives: Iterable[Objective]) -> list[tuple[Objective, list[Objective]]]:
    """Every `rr` among them, with all of `rmu`; none where there is no `rmu`."""
    chosen = [*objectives]
    misdirecting = [objective for objective in chosen if objective.name == "rmu"]
    return [(objective, misdirecting) for objective in chosen if objective.name == "rr" and misdirecting]


def check_scale(objectives: Iterable[Objective]) -> None:
    """Raises ValueError that names both for an `rmu` and an `rr` of which one is divided by H and the other is not.

    Their weights would be H times other than they say. Presets that are registered elsewhere are not judged."""
    for retaining, misdirecting in pairs_of(objectives):
        for other in misdirecting:
            scales = {(each.preset in BY_SIZE) for each in (other, retaining) if each.preset in (*PLAIN, *BY_SIZE)}
            if len(scales) > 1:
                raise ValueError(
                    f"{called(other)} and {called(retaining)}: needs one scale, and one of them divides by the hidden "
                    f"size H; give rr preset={other.preset!r} too, or rmu preset={retaining.preset!r}"
                )


def check_layers(objectives: Iterable[Objective], number: Callable[[Layer], int]) -> None:
    """Raises ValueError that names both for an `rr` at a layer where no `rmu` is. number: of a layer, in the model."""
    for retaining, misdirecting in pairs_of(objectives):
        at, others = layer_of(retaining), [*map(layer_of, misdirecting)]
        if number(at) not in map(number, others):
            counted = ", ".join(f"{layer!r} is {number(layer)}" for layer in (*others, at) if isinstance(layer, str))
            raise ValueError(
                f"{' and '.join(map(called, misdirecting))} and {called(retaining)}: needs one layer"
                f"{f' ({counted} of this model)' if counted else ''}; give rr layer={others[0]!r} too"
            )


def layer_of(objective: Objective) -> Layer:
    layer: Layer = objective.options["layer"]
    return layer


def called(objective: Objective) -> str:
    return f"{objective.name} (preset {objective.preset}, layer {objective.options['layer']!r})"
