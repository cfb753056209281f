"""Metrics of unlearning: what a model still says of a set of questions and answers.

Each is a function registered by its name (`metric`), in a file per family: `teacher_forced` (the model reads the
answer), `generation` (it writes one), `privacy` (was it seen in training?), `text` (what it writes by itself),
`semantics` (what that means, by small models), `judge` (what a large one behind an `endpoint` says of it). What it
reads and writes is made once for all of them, by the batch (`reading`), and put together by `evaluate`. Where code
bases disagree, the variants are named options. `suites` has the numbers of papers' tables, `utility` what they are made
of, `logs` the files of others.
"""

from .encoders import Classifier, Embedder
from .endpoint import Endpoint, EndpointError
from .evaluate import DEFAULT_METRICS, EvaluationResult, Examination, evaluate, readings_by
from .examine import Number, SuiteResult, aggregate, evaluate_suite
from .extraction import extraction_likelihood
from .generation import greedy_generate, greedy_tokens, rouge_l_recall, rouge_scores
from .intervals import Interval, difference_interval, mean_interval
from .judge import hallucination, naturalness, similarity
from .logs import Entry, Log, read_log, write_log
from .metric import METRICS, CannotMeasure, Metric, Told, get_metric, metric
from .perplexity import perplexity, text_perplexity
from .privacy import auc, privacy, privleak
from .reading import Kept, Reading, cache_folder, read_rows
from .sampled import sample_tokens
from .semantics import clean, cosine_similarity, entailment_score, nearest_answer, toxicity
from .suites import SUITES, Aggregate, Form, Measure, Suite, get_suite
from .teacher_forced import Variant, extraction_strength, memorization_accuracy, probability, teacher_forced
from .text import fluency, token_entropy
from .utility import ForgetQuality, forget_quality, harmonic_mean, model_utility
from .zero_shot import zero_shot

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "SUITES",
    "Aggregate",
    "CannotMeasure",
    "Classifier",
    "Embedder",
    "Endpoint",
    "EndpointError",
    "Entry",
    "EvaluationResult",
    "Examination",
    "ForgetQuality",
    "Form",
    "Interval",
    "Kept",
    "Log",
    "Measure",
    "Metric",
    "Number",
    "Reading",
    "Suite",
    "SuiteResult",
    "Told",
    "Variant",
    "aggregate",
    "auc",
    "cache_folder",
    "clean",
    "cosine_similarity",
    "difference_interval",
    "entailment_score",
    "evaluate",
    "evaluate_suite",
    "extraction_likelihood",
    "extraction_strength",
    "fluency",
    "forget_quality",
    "get_metric",
    "get_suite",
    "greedy_generate",
    "greedy_tokens",
    "hallucination",
    "harmonic_mean",
    "mean_interval",
    "memorization_accuracy",
    "metric",
    "model_utility",
    "naturalness",
    "nearest_answer",
    "perplexity",
    "privacy",
    "privleak",
    "probability",
    "read_log",
    "read_rows",
    "readings_by",
    "rouge_l_recall",
    "rouge_scores",
    "sample_tokens",
    "similarity",
    "teacher_forced",
    "text_perplexity",
    "token_entropy",
    "toxicity",
    "write_log",
    "zero_shot",
]
