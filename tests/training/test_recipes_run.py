"""Recipes whose objectives read the model in their own way, as whole runs."""

from __future__ import annotations

import pytest

from pyunlearn.recipes import recipe
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import read_metrics


@pytest.mark.parametrize("name", ["bst", "undial", "ce_u", "pdu", "flat"])
def test_a_recipe_trains(tiny_config, name):
    """With references in caches on disk, and the loss of the terms that were asked for on every line."""
    unlearn = {**recipe(name), "max_steps": 2}
    folder = run(tiny_config({"unlearn": unlearn, "memorise": {"epochs": 1}})).folder
    steps = [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == "unlearn"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(f"forget.{name}/loss" in row for row in steps)
    assert bool([*folder.rglob("forget.safetensors")]) == (name == "undial")
