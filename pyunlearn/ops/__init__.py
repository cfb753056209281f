"""Public kernels. Each op has an eager twin, a fused backend per device, and one contract (`contract.py`)."""

from .contract import OUTPUTS, TokenStats
from .from_hidden import linear_token_stats
from .from_logits import token_stats
from .one_pass import TokenRule, value_and_grad

__all__ = ["OUTPUTS", "TokenRule", "TokenStats", "linear_token_stats", "token_stats", "value_and_grad"]
