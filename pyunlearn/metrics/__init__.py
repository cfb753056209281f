"""Metrics of unlearning: what a model still says of a set of questions and answers.

Each is a function registered by its name (`metric`), in a file per family: `teacher_forced` (the model reads the
answer), `generation` (it writes one), `privacy` (was it seen in training?). What it reads and writes is made once for
all of them, by the batch (`reading`), and put together by `evaluate`. Where code bases disagree, the variants are named
options. `suites` has the numbers of papers' tables, `utility` what they are made of, `logs` the files of others.
"""

from .evaluate import DEFAULT_METRICS, EvaluationResult, Examination, evaluate, readings_by
from .examine import Number, SuiteResult, aggregate, evaluate_suite
from .extraction import extraction_likelihood
from .generation import greedy_generate, greedy_tokens, rouge_l_recall, rouge_scores
from .logs import Entry, Log, read_log, write_log
from .metric import METRICS, CannotMeasure, Metric, get_metric, metric
from .privacy import auc, privacy, privleak
from .reading import Kept, Reading, cache_folder, read_rows
from .suites import SUITES, Aggregate, Measure, Suite, get_suite
from .teacher_forced import Variant, extraction_strength, memorization_accuracy, probability, teacher_forced
from .utility import ForgetQuality, forget_quality, harmonic_mean, model_utility

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "SUITES",
    "Aggregate",
    "CannotMeasure",
    "Entry",
    "EvaluationResult",
    "Examination",
    "ForgetQuality",
    "Kept",
    "Log",
    "Measure",
    "Metric",
    "Number",
    "Reading",
    "Suite",
    "SuiteResult",
    "Variant",
    "aggregate",
    "auc",
    "cache_folder",
    "evaluate",
    "evaluate_suite",
    "extraction_likelihood",
    "extraction_strength",
    "forget_quality",
    "get_metric",
    "get_suite",
    "greedy_generate",
    "greedy_tokens",
    "harmonic_mean",
    "memorization_accuracy",
    "metric",
    "model_utility",
    "privacy",
    "privleak",
    "probability",
    "read_log",
    "read_rows",
    "readings_by",
    "rouge_l_recall",
    "rouge_scores",
    "teacher_forced",
    "write_log",
]
