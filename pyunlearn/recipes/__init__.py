"""Unlearning methods by the names papers give them: settings of `unlearn`, laid under what the user sets.

sga and cga update on one sample at a time, as Algorithm 2 of arXiv:2504.06658; graddiff, npo and po retain by `gd`.
Any of them, followed by +mrd, draws its forget samples by Memory Removal Difficulty (Section 3.4).
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

ONE_BY_ONE = {"forget": [{"name": "ga"}], "retain": [], "batch_size": 1, "gradient_accumulation_steps": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "ga": {"forget": [{"name": "ga"}], "retain": []},
    "sga": {**ONE_BY_ONE, "sampling": {"by": "uniform"}},
    "cga": {**ONE_BY_ONE, "sampling": {"by": "mrd"}},
    "graddiff": {"forget": [{"name": "ga"}], "retain": [{"name": "gd"}]},
    "npo": {"forget": [{"name": "npo"}], "retain": [{"name": "gd"}]},
    "po": {"forget": [{"name": "idk"}], "retain": [{"name": "gd"}]},
}
SUFFIX = "+mrd"


def recipe(name: str) -> dict[str, Any]:
    """Settings of `unlearn` by the name of a recipe, e.g. "cga" or "NPO+MRD"; case does not matter.

    Raises ValueError naming the nearest recipes.
    """
    base = name.lower().removesuffix(SUFFIX)
    if base not in RECIPES:
        near = difflib.get_close_matches(base, RECIPES, n=3, cutoff=0.5)
        told = f"did you mean {' or '.join(near)}?" if near else f"needs one of {', '.join(RECIPES)}"
        raise ValueError(f"unlearn.recipe={name!r}: {told} Each may end in {SUFFIX}")
    settings = copy.deepcopy(RECIPES[base])
    if name.lower().endswith(SUFFIX):
        settings["sampling"] = {"by": "mrd"}
    return settings
