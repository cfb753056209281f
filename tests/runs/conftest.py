"""The tiny world's fixtures; and whether the real model is here."""

from __future__ import annotations

import os
from pathlib import Path

from ..tiny import arguments, tiny, tiny_config, tiny_settings  # noqa: F401 (fixtures)
from .calibrated import finished, folder  # noqa: F401 (fixtures)

SMOLLM2 = os.environ.get("PYUNLEARN_SMOLLM2_GGUF", "")
TOFU = Path(os.environ.get("PYUNLEARN_TOFU", Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu"))
PRETRAINED = Path(SMOLLM2).is_file() and (TOFU / "forget01.jsonl").is_file()
# A real model of 135 million parameters is no part of the repository.
collect_ignore = [] if PRETRAINED else ["test_smollm2.py"]


def pytest_report_header() -> str:
    told = (
        "runs"
        if PRETRAINED
        else "is left out: PYUNLEARN_SMOLLM2_GGUF and PYUNLEARN_TOFU do not name a file and a folder"
    )
    return f"tests/runs/test_smollm2.py {told}"
