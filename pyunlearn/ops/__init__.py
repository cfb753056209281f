"""Public kernels. Each op has an eager twin, a fused backend per device, and one contract (`contract.py`)."""

from .contract import OUTPUTS, TokenStats
from .linear_token_stats import linear_token_stats
from .token_stats import token_stats

__all__ = ["OUTPUTS", "TokenStats", "linear_token_stats", "token_stats"]
