"""Public kernels. Each op has an eager twin, a fused backend per device, and one contract (`contract.py`)."""

from . import schemas
from .contract import OUTPUTS, TokenRule, TokenStats
from .from_hidden import linear_token_stats
from .from_logits import token_stats
from .ghost import ghost_dot
from .noise import gaussian_noise
from .one_pass import value_and_grad
from .one_pass_hidden import LinearGradients, linear_value_and_grad
from .outer_sum import OuterSum
from .perturbation import perturbed
from .segment_dot import SegmentDots, segment_dot

__all__ = [
    "OUTPUTS",
    "LinearGradients",
    "OuterSum",
    "SegmentDots",
    "TokenRule",
    "TokenStats",
    "gaussian_noise",
    "ghost_dot",
    "linear_token_stats",
    "linear_value_and_grad",
    "perturbed",
    "schemas",
    "segment_dot",
    "token_stats",
    "value_and_grad",
]
