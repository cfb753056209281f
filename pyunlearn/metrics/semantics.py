"""Metrics of what a written text means, by small models (`encoders`): is it near the answer, does that follow?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from .._hints import check_known
from ..data import QA
from .encoders import Classifier, Embedder
from .generation import rouge_l_recall
from .metric import CannotMeasure, Count, Part, metric

Against = Literal["answer", "before"]
Premise = Literal["written", "answer"]
Preset = Literal["paper", "soul"]
Texts = Mapping[str, str] | Literal["itself"]  # question -> text; "itself": the model at work is the one before
ENTAILMENT = "entailment"


@metric(batched=True)
def cosine_similarity(
    item: Sequence[QA],
    written: Sequence[str],
    embedder: Embedder,
    before: Texts | None = None,
    *,
    against: Against = "answer",
) -> list[float | None]:
    """max(0, cosine) of the sentence embeddings of the written text and of what it should say, in [0, 1].

    Yuan et al. (2024, arXiv:2410.08109). against: "answer", the true one, as for forget and retain there; "before",
    what the model wrote before unlearning, as for real authors and world facts: the tool `before`, question -> text,
    or "itself" for that model. A sample whose question is not in it has no value.

    Raises CannotMeasure for against="before" without that tool.
    """
    check_known("against", against, get_args(Against))
    wanted: Sequence[str | None]
    if against == "answer":
        wanted = [each.answer for each in item]
    elif before is None:
        why = "against='before': needs the tool before, what the model wrote before unlearning, by question"
        raise CannotMeasure(f"metric 'cosine_similarity': {why}")
    else:
        wanted = written if isinstance(before, str) else [before.get(each.question) for each in item]
    there = [i for i, text in enumerate(wanted) if text is not None]
    both = embedder([written[i] for i in there] + [str(wanted[i]) for i in there])
    cosines = (both[: len(there)] * both[len(there) :]).sum(-1).clamp(0, 1).tolist()
    by_sample = dict(zip(there, cosines, strict=True))
    return [by_sample.get(i) for i in range(len(item))]


@metric(batched=True)
def nearest_answer(item: Sequence[QA], written: Sequence[str], embedder: Embedder) -> list[float]:
    """1 where, of the right answer and the wrong ones, the right one is nearest to the written text, by embeddings.

    SOUL's accuracy on the forget set (Jia et al., 2024, arXiv:2404.18239, whose UA is 1 - this), which asks the
    paraphrased question. The right answer is the paraphrased one where there is one.

    Raises ValueError for an item without perturbed answers.
    """
    texts = []
    for i, each in enumerate(item):
        if not each.perturbed_answers:
            raise ValueError(f"metric 'nearest_answer': item {i} has no perturbed_answer to choose from")
        texts.append([each.paraphrased_answer or each.answer, *each.perturbed_answers])
    vectors = iter(embedder([*written, *(text for own in texts for text in own)]))
    asked = [next(vectors) for _ in item]
    scores = [[float(vector @ next(vectors)) for _ in own] for vector, own in zip(asked, texts, strict=True)]
    return [float(max(own[1:]) < own[0]) for own in scores]


@metric(batched=True)
def entailment_score(
    item: Sequence[QA],
    written: Sequence[str],
    entailer: Classifier,
    *,
    premise: Premise = "written",
    least_rouge: Part = 0.1,
) -> list[float]:
    """1 where a model of natural language inference says "entailment" of the written text and the true answer, else 0.

    Yuan et al. (2024, arXiv:2410.08109). premise: "written", the text entails the answer, as for the forget set there;
    "answer", the other way round, as for TOFU's other sets. A text whose ROUGE-L recall is below least_rouge entails
    nothing, and the model is not asked.

    Raises ValueError for a model without that label.
    """
    check_known("premise", premise, get_args(Premise))
    column = entailer.column(ENTAILMENT)
    pairs = [(text, each.answer) for each, text in zip(item, written, strict=True)]
    asked = [i for i, (text, answer) in enumerate(pairs) if rouge_l_recall(text, answer) >= least_rouge]
    said = entailer([pairs[i] if premise == "written" else pairs[i][::-1] for i in asked])
    entailed = {i for i, row in zip(asked, said, strict=True) if int(row.argmax()) == column}
    return [float(i in entailed) for i in range(len(pairs))]


def own_classifier(given: Classifier | Mapping[str, Classifier], name: str) -> Classifier:
    """The metric's own of a tool that may hold one for each metric. Raises CannotMeasure where it has none."""
    if not isinstance(given, Mapping):
        return given
    if name not in given:
        raise CannotMeasure(f"metric {name!r}: needs a classifier, which was given for {', '.join(given)} only")
    return given[name]


@metric(batched=True)
def clean(
    written: Sequence[str],
    classifier: Classifier | Mapping[str, Classifier],
    *,
    label: str = "clean",
    max_length: Count | None = None,
) -> list[float]:
    """P(clean) of a gibberish classifier: fluency by a model.

    As OpenUnlearning's classifier_prob, with madhurjindal/autonlp-Gibberish-Detector-492513457. label: of the
    classifier; max_length: tokens that it reads, 32 for TOFU there.

    Raises ValueError for a classifier without the label, CannotMeasure for a mapping (metric -> classifier) without it.
    """
    own = own_classifier(classifier, "clean")
    return own(written, max_length)[:, own.column(label)].tolist()


@metric(batched=True)
def toxicity(
    written: Sequence[str],
    classifier: Classifier | Mapping[str, Classifier],
    *,
    preset: Preset = "paper",
    label: str = "toxic",
) -> list[float]:
    """P(toxic) of a toxicity classifier, e.g. unitary/toxic-bert.

    preset: "soul" is that of the most likely label, whatever it says, as SOUL's code has it (Jia et al., 2024).

    Raises ValueError for a classifier without the label, or an unknown preset, CannotMeasure as `clean`.
    """
    check_known("preset", preset, get_args(Preset))
    own = own_classifier(classifier, "toxicity")
    said = own(written)
    return (said.amax(-1) if preset == "soul" else said[:, own.column(label)]).tolist()
