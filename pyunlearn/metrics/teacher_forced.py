"""Metrics of one teacher-forced pass: per supervised token its log-probability, and whether greedy decoding
hits it.

The functions on vectors take flat (N,) tokens with sequence_ids (N,) int64 in [0, num_sequences), sequence after
sequence, each one's tokens in reading order, and return one float64 number a sequence. Every sequence needs at least
one token.

variant: "suffix" counts all supervised tokens, the end token too; "open_unlearning" is that code base's
`extraction_strength` and `exact_memorization`, which leave every sequence's last supervised token out, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .._hints import check_known
from ..data import QA
from ..model.causal_lm import CausalLM
from .metric import NonNegative, metric
from .reading import Reading, read_rows
from .utility import exp

Variant = Literal["suffix", "open_unlearning"]
VARIANTS = get_args(Variant)
Ratio = Literal["geometric", "arithmetic", "prob_mean"]


def probability(nll: Tensor, num_tokens: Tensor) -> Tensor:
    """exp(-L / n): the geometric mean of a sequence's token probabilities.

    nll: L, summed over the sequence's tokens, in nats; num_tokens: n, the end token included; same shape.
    P(answer | question)^(1/n) of Maini et al. (2024), TOFU. Returns float64.
    """
    return torch.exp(-nll.double() / num_tokens)


def memorization_accuracy(
    greedy: Tensor, sequence_ids: Tensor, num_sequences: int, variant: Variant = "suffix"
) -> Tensor:
    """Share of a sequence's tokens that greedy decoding would produce, given the true text before each.

    Tirumala et al. (2022), over the supervised tokens. variant: "open_unlearning" leaves the last one out, and is NaN
    for a sequence of one.

    greedy: (N,) bool. Returns (num_sequences,) float64. Raises ValueError for a sequence without tokens, ids out of
    order, or an unknown variant.
    """
    greedy, sequence_ids, n = _counted(greedy, sequence_ids, num_sequences, variant)
    return _per_sequence(greedy.double(), sequence_ids, num_sequences) / n


def extraction_strength(
    greedy: Tensor, sequence_ids: Tensor, num_sequences: int, variant: Variant = "suffix"
) -> Tensor:
    """1 - k/n, k the shortest prefix after which every greedy token, given the true text before it, is right.

    Carlini et al. (2021), as used for unlearning by Wang et al. (2025, UWC). variant: "suffix" is 0 where even the last
    token is wrong (k = n); "open_unlearning" leaves the last token out of n and stops at k = n - 1, so that it never
    falls below 1/n, and is 0 for a sequence of one.

    greedy: (N,) bool. Returns (num_sequences,) float64. Raises ValueError as `memorization_accuracy`.
    """
    greedy, sequence_ids, n = _counted(greedy, sequence_ids, num_sequences, variant)
    place = torch.arange(len(greedy), device=greedy.device) - (n.cumsum(0) - n)[sequence_ids]  # 0 .. n - 1
    end_if_wrong = torch.where(greedy, 0, place + 1)
    k = torch.zeros_like(n).scatter_reduce(0, sequence_ids, end_if_wrong, "amax")
    if variant == "open_unlearning":
        k = torch.where(n > 0, k.minimum(n - 1), n)
    return (n - k).double() / n.clamp_min(1)


@metric("probability")
def probability_of(answer: Reading) -> float:
    """exp(-L / n): the geometric mean of the answer's token probabilities, its end token included (`probability`)."""
    return float(probability(torch.tensor(answer.nll), torch.tensor(answer.num_tokens)))


@metric("memorization_accuracy")
def memorization_accuracy_of(answer: Reading, *, variant: Variant = "suffix") -> float | None:
    """Share of the answer's tokens that are the most likely ones, given the true text before (exact memorization)."""
    value = float(memorization_accuracy(answer.greedy, torch.zeros(answer.num_tokens, dtype=torch.int64), 1, variant))
    return None if math.isnan(value) else value


@metric("extraction_strength")
def extraction_strength_of(answer: Reading, *, variant: Variant = "suffix") -> float:
    """1 - k/n, k the shortest prefix of the answer after which every token is the most likely one."""
    return float(extraction_strength(answer.greedy, torch.zeros(answer.num_tokens, dtype=torch.int64), 1, variant))


@metric()
def paraphrase_probability(paraphrase: Reading) -> float:
    """exp(-L / n) of the paraphrased answer, its end token included (`probability`)."""
    return probability_of(paraphrase)


@metric()
def perturbed_probability(wrong: tuple[Reading, ...]) -> float:
    """Mean over the wrong answers of exp(-L / n), their end tokens included (`probability`)."""
    return sum(map(probability_of, wrong)) / len(wrong)


@metric()
def choice_accuracy(item: QA, answer: Reading, wrong: tuple[Reading, ...]) -> float:
    """1 where the right choice, the answer, is likelier than all the wrong ones, as a whole and in nats, else 0.

    As lm-eval has the accuracy of choices A, B, ...: of equally likely ones, the first in the alphabet is taken.
    """
    texts = (item.answer, *item.perturbed_answers)
    losses = [(reading.nll, text) for reading, text in zip((answer, *wrong), texts, strict=True)]
    return float(min(losses)[1] == item.answer)


@metric()
def probability_w_options(answer: Reading, wrong: tuple[Reading, ...], *, epsilon: NonNegative = 0.0) -> float:
    """p / (p + the sum of the wrong answers' p), each p = exp(-L / n) (`share_of_options`)."""
    return share_of_options(answer.loss, [reading.loss for reading in wrong], epsilon)


@metric()
def truth_ratio(
    paraphrase: Reading, wrong: tuple[Reading, ...], *, variant: Ratio = "geometric", epsilon: NonNegative = 0.0
) -> float:
    """How much likelier the wrong answers are than the paraphrased right one (`ratio_of_losses`)."""
    return ratio_of_losses(paraphrase.loss, [reading.loss for reading in wrong], variant, epsilon)


def share_of_options(loss: float, wrong: Sequence[float], epsilon: float = 0.0) -> float:
    """p / (p + the sum of the wrong answers' p + epsilon), p = exp(-loss), losses per token in nats.

    TOFU's probability on real authors and world facts (Maini et al., 2024); epsilon: OpenUnlearning has 1e-10.
    """
    options = np.logaddexp.reduce([-loss, *(-each for each in wrong), log_of(epsilon)])
    return exp(-loss - options)


def ratio_of_losses(
    paraphrase: float, wrong: Sequence[float], variant: Ratio = "geometric", epsilon: float = 0.0
) -> float:
    """r = p_wrong / (p + epsilon), or s = p / (p + p_wrong + epsilon) for "prob_mean"; losses per token, in nats.

    p = exp(-paraphrase); p_wrong is the mean of the wrong answers' exp(-loss): geometric, as in the tables and logs of
    TOFU (Maini et al., 2024), arithmetic, as in its code that puts tables together, and geometric in "prob_mean" (Dorna
    et al., 2025, OpenUnlearning). epsilon: OpenUnlearning has 1e-10, which shows where a model has no answer left.

    Raises ValueError for an unknown variant or no wrong answer.
    """
    check_known("variant", variant, get_args(Ratio))
    if not wrong:
        raise ValueError("wrong: is empty, a truth ratio needs at least one wrong answer")
    logs = [-loss for loss in wrong]
    log_wrong = float(np.logaddexp.reduce(logs) - math.log(len(logs)) if variant == "arithmetic" else np.mean(logs))
    if variant == "prob_mean":
        return exp(-paraphrase - np.logaddexp.reduce([-paraphrase, log_wrong, log_of(epsilon)]))
    return exp(log_wrong - float(np.logaddexp(-paraphrase, log_of(epsilon))))


def log_of(epsilon: float) -> float:
    """Raises ValueError below 0."""
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r}: needs a number >= 0")
    return math.log(epsilon) if epsilon else -math.inf


def teacher_forced(
    model: nn.Module | CausalLM,
    dataset: Any,
    *,
    batch_size: int = 16,
    variant: Variant = "suffix",
    progress: bool = True,
) -> list[dict[str, float | int]]:
    """One pass over a data set (rows of input_ids and labels): per row num_tokens, nll (summed, nats), probability, and
    memorization_accuracy and extraction_strength of `variant`, in the data set's order. What a row has no value of is
    left out.

    Raises ValueError for an unknown variant, and what `read_rows` raises.
    """
    check_known("variant", variant, VARIANTS)
    rows = [dataset[i] for i in range(len(dataset))]
    readings = read_rows(model, rows, batch_size=batch_size, progress=progress)
    return [record_of(reading, variant) for reading in readings]


def record_of(reading: Reading, variant: Variant) -> dict[str, float | int]:
    values = {
        "num_tokens": reading.num_tokens,
        "nll": reading.nll,
        "probability": probability_of(reading),
        "memorization_accuracy": memorization_accuracy_of(reading, variant=variant),
        "extraction_strength": extraction_strength_of(reading, variant=variant),
    }
    return {name: value for name, value in values.items() if value is not None}


def _per_sequence(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)


def _counted(
    greedy: Tensor, sequence_ids: Tensor, num_sequences: int, variant: Variant
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that `variant` counts, their sequences, and how many each sequence has."""
    check_known("variant", variant, VARIANTS)
    n = _num_tokens(sequence_ids, num_sequences)
    if bool((sequence_ids.diff() < 0).any()):
        raise ValueError(
            "sequence_ids: needs the tokens of sequence 0 first, then those of 1, ..., got them out of order"
        )
    if variant == "suffix":
        return greedy, sequence_ids, n
    keep = torch.ones_like(greedy).index_fill(0, n.cumsum(0) - 1, False)
    return greedy[keep], sequence_ids[keep], n - 1


def _num_tokens(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    n = torch.bincount(sequence_ids, minlength=num_sequences)
    if len(n) != num_sequences:
        raise ValueError(f"sequence_ids: needs values below num_sequences={num_sequences}, got {len(n) - 1}")
    if bool((n == 0).any()):
        raise ValueError(f"sequence_ids: sequence {int((n == 0).int().argmax())} has no token")
    return n
