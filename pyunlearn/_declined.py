"""An optimisation that does not apply says so: once in the log, and wherever its caller keeps diagnostics."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger("pyunlearn")
_logged: set[tuple[str, str]] = set()


def decline(optimisation: str, reason: str) -> str:
    """Logs `optimisation: reason` at level INFO the first time; returns the reason, for the diagnostics.

    optimisation: its name in the docs, such as "shared prefix". reason: why not, in a few words, such as "the model's
    forward takes no cache".
    """
    kind = optimisation, re.sub(r"\d+", "N", reason)  # other counts are no other reason
    if kind not in _logged:
        _logged.add(kind)
        logger.info("%s is not used: %s", optimisation, reason)
    return reason


# What torch.compiler.assume_constant_result does, which would import dynamo: a trace calls it, and has the reason.
decline._dynamo_marked_constant = True  # type: ignore[attr-defined]
