"""Objectives on text that a model has written: its own samples, alternate answers, generic words.

A training makes the text (`pyunlearn.training.written`) and gives its statistics by the names of their batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from .._hints import check_known
from .closed_form import gained_over
from .definition import POSITIVE, Domain, Positive, is_finite, is_whole
from .objective import Objective, Samples
from .registry import get, register

WHOLE = Domain("a whole number >= 1", lambda value: is_whole(value) and value >= 1)
Whole = Annotated[int, WHOLE]
SAMPLED = ("ga", "npo", "bst")  # what `bss` may be made of


@register(
    "altpo",
    level="sequence",
    formula="-(factor/beta) mean over pairs of log sigmoid(beta ((L°_w - L_w) - (L°_l - L_l))), "
    "w = alternate, l = answer",
    source="Mekala et al., Alternate Preference Optimization for Unlearning Factual Knowledge, COLING 2025",
    presets={"open_unlearning": {}},
)
def altpo(
    alternate_logp: Tensor,
    answer_logp: Tensor,
    alternate_ref_logp: Tensor,
    answer_ref_logp: Tensor,
    *,
    beta: Positive = 0.1,
    factor: Positive = 2.0,
    alternates: Whole = 5,
    sampling_temperature: Positive = 1.0,
    max_new_tokens: Whole = 200,
) -> Tensor:
    """Alternate preference optimization: `dpo` whose winners are other answers that the model itself makes up.

    In a training each forget question has so many `alternates`, sampled once from the start model, which is asked for a
    plausible but different answer; an epoch pairs each of them with the true answer. The paper searches beta .05, .1,
    .5, beside a retain loss of weight 1, 2, 5, for two such epochs at 1e-5 to 5e-5.

    >>> logp = torch.tensor([[-1.0, -3.0]])
    >>> altpo(logp, logp, logp, logp, beta=1.0)  # 2 log 2
    tensor(1.3863)
    """
    gained = gained_over(alternate_logp, answer_logp, alternate_ref_logp, answer_ref_logp)
    return -factor / beta * F.logsigmoid(beta * gained)


@register(
    "whp",
    batch="generic",
    paper_reduction="sequence_mean",
    formula="mean of l_t over the forget rows with generic labels",
    source="Eldan and Russinovich, Who's Harry Potter? Approximate Unlearning in LLMs, 2023",
    slope=-1.0,
)
def whp(logp: Tensor) -> Tensor:
    """Fine-tune on the forget text with the labels of a model that had never been taught it.

    The label of a position is argmax v, v = v_base - a ReLU(v_reinforced - v_base), where the reinforced model is the
    start model trained further on the forget set (in a training: `unlearn.reinforce`, a is its `strength`).

    >>> whp(torch.tensor([[-1.0, -3.0]]))
    tensor(2.)
    """
    return -logp


PRESETS = {"paper": "bst", "bs_code": "ga"}  # of `bss`: its F
OWN = {  # of `bss`, beside the options of F
    "weight": Domain("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1),
    "samples": WHOLE,
    "sampling_temperature": POSITIVE,
    "max_new_tokens": WHOLE,
    "refresh_epochs": Domain("a whole number >= 0", lambda value: is_whole(value) and value >= 0),
}


def bss(
    *,
    of: str | None = None,
    weight: float = 0.5,
    samples: int = 3,
    sampling_temperature: float = 1.0,
    max_new_tokens: int = 200,
    refresh_epochs: int = 2,
    preset: str | None = None,
    reduction: str | None = None,
    **options: Any,
) -> list[tuple[Objective, float]]:
    """Bootstrapping on samples: (1 - weight) F(answers) + weight F(the model's own samples for the same prompts).

    Two terms, in the form that `UnlearnTrainer(objectives=[*bss(), "gd"])` takes; in a run, `unlearn.forget: bss`. Each
    forget prompt has N `samples` of its own, which count weight / N each; the authors' code keeps the samples of the
    one batch at which it last drew some, and takes them beside every other batch too.

    Args:
        of: F, one of ga, npo and bst, by name; None: that of the preset. options: those of F, and
            `temperature`, `keep` and `kept`, which any objective has.
        weight: lambda; 0 leaves F alone.
        samples, sampling_temperature, max_new_tokens: how many a prompt, and how they are drawn.
        refresh_epochs: drawn anew, by the model as it is then, whenever so many epochs have gone by (on-policy); 0:
            once, by the start model (off-policy).
        preset: "paper" (F = bst, the best reported) or "bs_code" (F = ga). reduction: of F.

    Source: LLM Unlearning with LLM Beliefs, ICLR 2026, Eq. 8 and 9.
    Raises: ValueError on an unknown F, preset or option (with the nearest ones), or on a value out of range.

    >>> [(term.name, term.kinds, share) for term, share in bss(of="ga", weight=0.25)]
    [('ga', {'answer': ''}, 0.75), ('ga', {'answer': '_sample'}, 0.25)]
    """
    preset = "paper" if preset is None else preset
    check_known("bss: preset", preset, PRESETS)
    of = PRESETS[preset] if of is None else of
    check_known("bss: of", of, SAMPLED)
    given = dict(zip(OWN, (weight, samples, sampling_temperature, max_new_tokens, refresh_epochs), strict=True))
    for name, domain in OWN.items():
        if not domain.holds(given[name]):
            raise ValueError(f"bss: {name}={given[name]!r}: needs {domain.text}")
    for name in options:
        check_known(
            "bss: option", name, ("of", *OWN, *get(of).options, "preset", "reduction", "temperature", "keep", "kept")
        )
    answers = get(of, reduction=reduction, **options)
    drawn = Samples(samples, float(sampling_temperature), max_new_tokens, refresh_epochs)
    parts = [(answers, 1.0 - weight), (replace(answers, samples=drawn), float(weight))]
    return [(part, share) for part, share in parts if share]


MIXTURES: dict[str, Callable[..., list[tuple[Objective, float]]]] = {"bss": bss}  # names that stand for several terms


def weighted(name: str, **options: Any) -> list[tuple[Objective, float]]:
    """What a name stands for, with each one's share: the objective itself, or the parts of a mixture.

    Raises as `get`.
    """
    return MIXTURES[name](**options) if name in MIXTURES else [(get(name, **options), 1.0)]
