"""Run by torchrun in test_work.py: draws, then data shared out over two processes; then a model sharded over them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import pyunlearn as pu
from tests.mrd.test_work import CASES, float32_model, six
from tests.two_processes import save_and_leave


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
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
    save_and_leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
