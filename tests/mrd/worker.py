"""Run by torchrun in test_work.py: scores with the draws, then with the data, shared out over two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

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
    save_and_leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
