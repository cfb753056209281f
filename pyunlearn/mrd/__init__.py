"""Memory Removal Difficulty: how hard a sample is to unlearn, from how its likelihood moves when weights are shaken."""

from .estimate import ESTIMATORS, MRDResult, check_arguments, check_estimator, mrd
from .samples import LABELS, Labels, scored_rows

__all__ = ["ESTIMATORS", "LABELS", "Labels", "MRDResult", "check_arguments", "check_estimator", "mrd", "scored_rows"]
