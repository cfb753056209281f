"""Memory Removal Difficulty: how hard a sample is to unlearn, from how its likelihood moves when weights are shaken."""

from .estimate import ESTIMATORS, MRDResult, check_arguments, mrd

__all__ = ["ESTIMATORS", "MRDResult", "check_arguments", "mrd"]
