"""The cases, a file for each kind of work: what is computed, on which inputs."""

from .base import MEMORY_BOUND, Case, Impl, Loss, Results, Run, backward, fused, straight
from .gradients import MANY_PAIRS, NORMS, ONE_PAIR, Norms, Pairs
from .linear import (
    BEYOND,
    FROZEN,
    LINEAR_KINDS,
    LINEAR_KL,
    MEAN,
    TOKENS,
    TOKENS_ENTROPY,
    Linear,
    Product,
)
from .logits import AT_ONCE, ENTROPY, KINDS, KL, NLL, STATISTICS, Logits
from .noise import MANY_TENSORS, ONE_TENSOR, Perturb

__all__ = [
    "AT_ONCE", "BEYOND", "ENTROPY", "FROZEN", "KINDS", "KL", "LINEAR_KINDS", "LINEAR_KL", "MANY_PAIRS", "MANY_TENSORS",
    "MEAN", "MEMORY_BOUND", "NLL", "NORMS", "ONE_PAIR", "ONE_TENSOR", "STATISTICS", "TOKENS", "TOKENS_ENTROPY", "Case",
    "Impl", "Linear", "Logits", "Loss", "Norms", "Pairs", "Perturb", "Product", "Results", "Run", "backward", "fused",
    "straight",
]  # fmt: skip
