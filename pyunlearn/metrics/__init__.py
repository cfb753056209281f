"""Metrics of unlearning: what a model still says of a set of questions and answers.

One file per family: `teacher_forced` (the model reads the answer), `generation` (it writes one). Where code
bases disagree, the variants are named options.
"""

from .evaluate import METRICS, EvaluationResult, evaluate
from .extraction import extraction_likelihood
from .generation import greedy_generate, greedy_tokens, rouge_l_recall
from .teacher_forced import Variant, extraction_strength, memorization_accuracy, probability, teacher_forced

__all__ = [
    "METRICS",
    "EvaluationResult",
    "Variant",
    "evaluate",
    "extraction_likelihood",
    "extraction_strength",
    "greedy_generate",
    "greedy_tokens",
    "memorization_accuracy",
    "probability",
    "rouge_l_recall",
    "teacher_forced",
]
