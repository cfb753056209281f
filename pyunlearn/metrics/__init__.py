"""Metrics of unlearning: what a model still says of a set of questions and answers.

Each is a function registered by its name (`metric`), in a file per family: `teacher_forced` (the model reads the
answer), `generation` (it writes one), `text` (what it writes by itself), `semantics` (what that means, by small
models), `judge` (what a large one behind an `endpoint` says of it). What it reads and writes is made once for all of
them, by the batch (`reading`), and put together by `evaluate`. Where code bases disagree, the variants are named
options.
"""

from .encoders import Classifier, Embedder
from .endpoint import Endpoint, EndpointError
from .evaluate import DEFAULT_METRICS, EvaluationResult, Examination, evaluate
from .extraction import extraction_likelihood
from .generation import greedy_generate, greedy_tokens, rouge_l_recall
from .intervals import Interval, difference_interval, mean_interval
from .judge import hallucination, naturalness, similarity
from .metric import METRICS, Metric, Told, get_metric, metric
from .perplexity import perplexity, text_perplexity
from .reading import Kept, Reading, cache_folder, read_rows
from .semantics import clean, cosine_similarity, entailment_score, nearest_answer, toxicity
from .teacher_forced import Variant, extraction_strength, memorization_accuracy, probability, teacher_forced
from .text import fluency, token_entropy
from .zero_shot import zero_shot

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Classifier",
    "Embedder",
    "Endpoint",
    "EndpointError",
    "EvaluationResult",
    "Examination",
    "Interval",
    "Kept",
    "Metric",
    "Reading",
    "Told",
    "Variant",
    "cache_folder",
    "clean",
    "cosine_similarity",
    "difference_interval",
    "entailment_score",
    "evaluate",
    "extraction_likelihood",
    "extraction_strength",
    "fluency",
    "get_metric",
    "greedy_generate",
    "greedy_tokens",
    "hallucination",
    "mean_interval",
    "memorization_accuracy",
    "metric",
    "naturalness",
    "nearest_answer",
    "perplexity",
    "probability",
    "read_rows",
    "rouge_l_recall",
    "similarity",
    "teacher_forced",
    "text_perplexity",
    "token_entropy",
    "toxicity",
    "zero_shot",
]
