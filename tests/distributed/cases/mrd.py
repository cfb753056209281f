"""MRD by two processes: draws, then data shared out over them; then a model sharded over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import fully_shard

import pyunlearn as pu
from tests.mrd.test_work import float32_model, six

CASES = [("algorithm1", "draws"), ("algorithm1", "data"), ("definition", "data"), ("gradient", "draws"),
         ("hutchinson", "draws")]  # fmt: skip


def shared_out(folder: Path) -> dict[str, Any]:
    results = {}
    for estimator, split in CASES:
        result = pu.mrd(
            float32_model(), six(), estimator, 5, batch_size=2, split=split, progress=False,
            state=folder / f"state-{estimator}-{split}",
        )  # fmt: skip
        kept = {"value": result.value, "standard_error": result.standard_error}
        results[f"{estimator} {split}"] = {**kept, "sigma_ratio": result.diagnostics["sigma_ratio"]}
    model = float32_model()
    for layer in model.model.layers:
        fully_shard(layer)
    result = pu.mrd(fully_shard(model), six(), num_draws=5, batch_size=2, progress=False)
    kept = {"value": result.value, "standard_error": result.standard_error}
    results["sharded"] = {**kept, "sigma_ratio": result.diagnostics["sigma_ratio"]}
    return results
