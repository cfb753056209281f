"""An optimisation that does not apply says so: once in the log, and wherever its caller keeps diagnostics."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("pyunlearn")


@cache
def decline(optimisation: str, reason: str) -> str:
    """Logs `optimisation: reason` at level INFO the first time; returns the reason, for the diagnostics.

    optimisation: its name in the docs, such as "shared prefix". reason: why not, in a few words, such as "the model's
    forward takes no cache".
    """
    logger.info("%s is not used: %s", optimisation, reason)
    return reason
