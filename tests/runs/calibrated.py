"""Finished runs that are calibrated: of a whole model, and by an adapter."""

from __future__ import annotations

import shutil

import pytest

from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.load import load_model
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.run import run
from pyunlearn.training.settings import merge

KNOWS = {
    "data": {"num_authors": 6},
    "memorise": {"epochs": 40, "learning_rate": 1e-2},
    "unlearn": {"forget": "npo", "retain": "gd", "epochs": 8, "learning_rate": 3e-3},
    "evaluate": {"metrics": ["probability", "extraction_strength", "rouge_l", "truth_ratio"]},
}
LORA = {"model": {"lora": {"r": 2, "save": "adapter"}}, "unlearn": {"learning_rate": 3e-2}}


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_settings):
    """Runs that learnt their rows by heart and forgot two: of a whole model, and by an adapter."""

    def make(changes):
        output = tmp_path_factory.mktemp("runs") / "known"
        run(RunConfig.model_validate(merge(merge(tiny_settings, KNOWS), {**changes, "output": str(output)})))
        return output

    runs = {"full": make({}), "adapter": make(LORA)}
    return runs.__getitem__


@pytest.fixture(params=["full", "adapter"])
def folder(finished, request):
    """One of them, as the run left it."""
    path = finished(request.param)
    for method in ("uwc", "cru"):
        shutil.rmtree(path / method, ignore_errors=True)
    return path


def weights(path):
    return model_fingerprint(load_model(str(path))[0])
