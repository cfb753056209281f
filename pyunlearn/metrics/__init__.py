"""Metrics of unlearning: what a model still says of a set of questions and answers.

Each is a function registered by its name (`metric`), in a file per family: `teacher_forced` (the model reads the
answer), `generation` (it writes one), `text` (what it writes by itself). What it reads and writes is made once for all
of them, by the batch (`reading`), and put together by `evaluate`. Where code bases disagree, the variants are named
options.
"""

from .evaluate import DEFAULT_METRICS, EvaluationResult, Examination, evaluate
from .extraction import extraction_likelihood
from .generation import greedy_generate, greedy_tokens, rouge_l_recall
from .metric import METRICS, Metric, Told, get_metric, metric
from .reading import Kept, Reading, cache_folder, read_rows
from .teacher_forced import Variant, extraction_strength, memorization_accuracy, probability, teacher_forced
from .text import fluency, token_entropy

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "EvaluationResult",
    "Examination",
    "Kept",
    "Metric",
    "Reading",
    "Told",
    "Variant",
    "cache_folder",
    "evaluate",
    "extraction_likelihood",
    "extraction_strength",
    "fluency",
    "get_metric",
    "greedy_generate",
    "greedy_tokens",
    "memorization_accuracy",
    "metric",
    "probability",
    "read_rows",
    "rouge_l_recall",
    "teacher_forced",
    "token_entropy",
]
