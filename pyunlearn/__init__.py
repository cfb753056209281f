"""pyunlearn: kernels and runs for LLM unlearning.

    import pyunlearn as pu

    stats = pu.token_stats(logits, targets, outputs=("logp", "entropy"))  # or linear_token_stats
    loss = pu.objectives.wga(stats.logp, stats.mask)

Whole runs: `pu.UnlearnTrainer`, `pu.ReferenceCache`, or the command `pyunlearn run`.
"""

from typing import TYPE_CHECKING, Any

from . import objectives, ops
from .geffect import g_effect, pointwise_g_effect
from .mrd import MRDResult, mrd
from .ops import (
    OuterSum,
    TokenStats,
    gaussian_noise,
    ghost_dot,
    linear_token_stats,
    perturbed,
    segment_dot,
    token_stats,
    value_and_grad,
)

if TYPE_CHECKING:
    from .model.cache import ReferenceCache
    from .training.trainer import UnlearnTrainer

__version__ = "0.1.0"
__all__ = [
    "MRDResult",
    "OuterSum",
    "ReferenceCache",
    "TokenStats",
    "UnlearnTrainer",
    "g_effect",
    "gaussian_noise",
    "ghost_dot",
    "linear_token_stats",
    "mrd",
    "objectives",
    "ops",
    "perturbed",
    "pointwise_g_effect",
    "segment_dot",
    "token_stats",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for: `import pyunlearn` stays quick."""
    if name == "UnlearnTrainer":
        from .training.trainer import UnlearnTrainer

        return UnlearnTrainer
    if name == "ReferenceCache":
        from .model.cache import ReferenceCache

        return ReferenceCache
    raise AttributeError(f"module 'pyunlearn' has no attribute {name!r}")
