"""pyunlearn: kernels and runs for LLM unlearning."""

from .ops import linear_token_stats, token_stats

__version__ = "0.1.0"
__all__ = ["linear_token_stats", "token_stats"]
