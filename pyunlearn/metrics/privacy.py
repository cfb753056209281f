"""Membership inference: can it be told from the losses of samples that they were forgotten?

Scores of one sample are signed like a loss: low for members. `auc` of the scores of forgotten samples against those of
a holdout set is then 1 for memorised ones, 0.5 where nothing tells them apart, and below for those that are unlearned
too far.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .._hints import check_known
from ..data import QA, collate
from ..data.prompt_format import Encoded, check_length
from ..gradients.per_sample import PerSample, SquaredNormsByParameter
from ..model.causal_lm import CausalLM, eval_mode
from ..model.combined import parts_of
from ..model.fingerprint import dataset_fingerprint
from ..model.forward import IGNORE_INDEX, length_batches, supervised_logits
from ..model.lora import FACTORS
from ..ops import token_stats
from ..ops.parameters import canonical
from .metric import CannotMeasure, Share, metric
from .reading import Kept, Reading, read_rows
from .teacher_forced import VARIANTS, Variant
from .utility import harmonic_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .evaluate import Examination

Text = Literal["scored", "answer"]


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Share of pairs (forgotten, held out) where the held out score is higher, ties half: area under the ROC curve.

    Exact, by ranks (Mann and Whitney). Raises ValueError for an empty set or NaN.
    """
    from scipy.stats import rankdata

    for name, values in (("forget", forget), ("holdout", holdout)):
        if not len(values) or any(value != value for value in values):
            raise ValueError(f"{name}: needs one or more scores, got {len(values)}" + " with NaN" * bool(len(values)))
    m, n = len(forget), len(holdout)
    ranks = rankdata([*forget, *holdout])
    return float(ranks[m:].sum() - n * (n + 1) / 2) / (m * n)


def privleak(auc: float, retained: float = 0.5, *, epsilon: float = 0.0) -> float:
    """100 (u - r) / (r + epsilon), u = 1 - AUC, of min-k: 0 as retrained, above: unlearned too far, -100: memorised.

    Shi et al. (2025), MUSE, whose AUC is u; OpenUnlearning adds epsilon = 1e-10. retained: the AUC of a model that was
    retrained without the forget set; 0.5 where there is none. Raises ValueError where r is 0 and epsilon too.
    """
    u, r = 1 - auc, 1 - retained
    if r + epsilon == 0:
        raise ValueError("retained=1.0: is 1 - 0 of a retrained model that knows the forget set; privleak divides by 0")
    return 100 * (u - r) / (r + epsilon)


def privacy(aucs: Mapping[str, float], retained: Mapping[str, float], full: Mapping[str, float]) -> float:
    """Harmonic mean over attacks of max(0, 1 - |AUC - AUC_retained| / |AUC_full - AUC_retained|), in [0, 1].

    Dorna et al. (2025), OpenUnlearning, over loss, zlib, min-k and min-k++. By name of the attack: AUCs of the
    unlearned model, of the retrained one, and of the one before unlearning. Raises ValueError for no attack, one that
    is missing, or one that does not tell the last two apart.
    """
    scaled = []
    for name, value in aucs.items():
        if name not in retained or name not in full:
            raise ValueError(f"{name}: has no AUC of the {'retained' if name not in retained else 'full'} model")
        span = abs(full[name] - retained[name])
        if not span:
            raise ValueError(
                f"{name}: has one AUC, {full[name]}, of the retained and the full model; nothing to scale by"
            )
        scaled.append(max(0.0, 1 - abs(value - retained[name]) / span))
    return harmonic_mean(scaled)


# ---- scores of one sample --------------------------------------------------------------------------------------------


@metric()
def mia_loss(answer: Reading) -> float:
    """L / n: the answer's mean negative log-likelihood in nats, its end token included (Yeom et al., 2018)."""
    return answer.loss


@metric()
def mia_zlib(item: QA, answer: Reading, tokenizer: PreTrainedTokenizerBase, *, text: Text = "scored") -> float:
    """L / n over the bytes that zlib makes of the answer's text in UTF-8 (Carlini et al., 2021).

    text: "scored", what the scored tokens say without special ones, a space before the answer too, as OpenUnlearning
    has it; "answer", the answer as it is in the data, without white space around it.
    """
    check_known("text", text, get_args(Text))
    if text == "answer":
        said = item.answer.strip()
    else:
        said = str(tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True))
    return answer.loss / len(zlib.compress(said.encode()))


@metric(batched=True)
def mia_reference(
    item: list[QA], answer: list[Reading], reference: Callable[[Sequence[QA]], Sequence[Reading]]
) -> list[float]:
    """L / n less that of a reference model (Carlini et al., 2021).

    reference: gives the readings of items by a second model, as `readings_by` makes it.
    """
    return [own.loss - other.loss for own, other in zip(answer, reference(item), strict=True)]


@metric()
def min_k(answer: Reading, *, k: Share = 0.4, variant: Variant = "suffix") -> float:
    """Negative mean of the lowest share k of the answer's log-probabilities, in nats (Shi et al., 2024).

    Of max(1, int(k n)) tokens, as coded by OpenUnlearning and MUSE.
    """
    return lowest(answer.logp, k, variant)


@metric(batched=True)
def text_min_k(item: list[QA], examination: Examination, *, k: Share = 0.4) -> list[float]:
    """`min_k` over all tokens of the prompt and the answer, without what ends it, and without the first (SOUL)."""
    limit, rows = examination.limit, list[dict[str, Any]]()
    for i, each in enumerate(item):
        ids = examination.format.begun_ids(each.question, each.answer)
        check_length(Encoded(ids, ids), limit, f"sample {i}", each.question)
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "index": i})
    readings = read_rows(
        examination.reader(),
        rows,
        batch_size=examination.batch_size,
        kept=examination.kept,
        progress=examination.progress,
    )
    return [lowest(reading.logp, k, "suffix") for reading in readings]


@metric(outputs=("entropy", "variance"))
def min_k_plus_plus(answer: Reading, *, k: Share = 0.4, variant: Variant = "suffix") -> float:
    """Negative mean of the lowest share k of (log p - mean) / deviation over the vocabulary (Zhang et al., 2025)."""
    deviation = answer.more["variance"].double().clamp_min(1e-6).sqrt()
    return lowest((answer.logp.double() + answer.more["entropy"].double()) / deviation, k, variant)


@metric(batched=True)
def mia_gradnorm(item: list[QA], examination: Examination, *, variant: Variant = "suffix") -> list[float]:
    """Mean over parameter tensors of the L2 norm of the gradient of L / n, dropout off (Wang et al., 2024).

    Of all parameters of the model that the loss reaches, tied ones once, whether or not they are trained now; they are
    left as they are found. Under LoRA the parameters are those of the merged model, whose gradients those of its base
    are, with the adapter on: the factors are none of them, and merging changes no number.

    Raises CannotMeasure for a parameter that is sharded, packed (quantised) or without a rule.
    """
    check_known("variant", variant, VARIANTS)
    return gradient_norms(examination, item, variant)


def lowest(values: Tensor, k: float, variant: Variant) -> float:
    """Raises ValueError unless 0 < k <= 1."""
    check_known("variant", variant, VARIANTS)
    if not 0 < k <= 1:
        raise ValueError(f"k={k}: needs a share of the tokens, 0 < k <= 1")
    values = values if variant == "suffix" else values[:-1]
    if not len(values):  # an answer of one token, and that one left out
        return 0.0
    return -float(values.double().sort().values[: max(1, int(k * len(values)))].mean())


def gradient_norms(examination: Examination, items: Sequence[QA], variant: Variant) -> list[float]:
    """One backward a batch, without any sample's gradient (`gradients.per_sample`). variant: "open_unlearning" leaves
    each answer's last token out. Raises CannotMeasure that names a parameter for which there is no rule, or an answer
    of one token that is left out.
    """
    lm, rows = examination.reader(), [dict(row) for row in examination.rows(items)]
    if parts_of(lm) is not None:
        raise CannotMeasure(f"gradient norms: the logits of {lm.name} are of two models, none of which is trained")
    for i, row in enumerate(rows):
        if variant == "open_unlearning":
            row["labels"] = row["labels"].clone()
            row["labels"][(row["labels"] != IGNORE_INDEX).nonzero()[-1]] = IGNORE_INDEX
            if not bool((row["labels"][1:] != IGNORE_INDEX).any()):
                raise CannotMeasure(f"items[{i}]: its answer has 1 token, none is left without the last")

    parameters = own_parameters(lm)

    def norms(batch: Sequence[int]) -> list[float]:
        padded = collate([rows[i] for i in batch], 0)
        return batch_norms(lm, {name: value.to(lm.device) for name, value in padded.items()}, parameters)

    def identity(batch: Sequence[int]) -> dict[str, Any]:
        return {"gradient norms": dataset_fingerprint([rows[i] for i in batch]), "of": "all parameters"}

    batches = length_batches([len(row["labels"]) for row in rows], examination.batch_size)
    norms_of: dict[int, float] = {}
    with eval_mode(lm.given):
        kept = examination.kept or Kept(None, lm)
        finished = kept.finish(batches, norms, identity, "gradient norms", examination.progress)
    for batch, values in finished:
        norms_of.update(zip(batch, values, strict=True))
    return [norms_of[i] for i in range(len(rows))]


def own_parameters(lm: CausalLM) -> list[str]:
    """Names of all parameters of the model, merged where it has an adapter. Raises CannotMeasure for packed ones."""
    adapted = hasattr(lm.alone, "peft_config")
    named = {canonical(name): weight for name, weight in lm.given.named_parameters(remove_duplicate=False)}
    names = [name for name in named if not (adapted and FACTORS.search(name))]
    if packed := [name for name in names if not named[name].is_floating_point()]:
        raise CannotMeasure(f"gradient norms: {packed[0]} is packed ({named[packed[0]].dtype}) and has no gradient")
    return names


def batch_norms(lm: CausalLM, batch: Mapping[str, Tensor], parameters: Sequence[str]) -> list[float]:
    def loss(rows: slice) -> Tensor:
        logits, targets = supervised_logits(lm, {name: tensor[rows] for name, tensor in batch.items()})
        head = lm.read_head()
        logp = token_stats(logits, targets, temperature=head.temperature, softcap=head.softcap).logp
        return -(logp.sum(1) / (targets != IGNORE_INDEX).sum(1)).sum()

    try:
        tap = PerSample(lm.given, parameters)
    except (TypeError, ValueError) as error:
        raise CannotMeasure(str(error)) from None
    with tap:
        squared = tap.collect(len(batch["labels"]), loss, SquaredNormsByParameter)
    return torch.stack([each.clamp_min(0).sqrt() for each in squared.values()]).mean(0).tolist()
