import io

import pytest
import torch
from rich.console import Console

from pyunlearn import doctor
from pyunlearn.ops import backends


@pytest.fixture
def report(monkeypatch):
    def run() -> tuple[int, str]:
        out = io.StringIO()
        code = doctor.main(Console(file=out, width=200))
        return code, out.getvalue()

    return run


def test_says_what_is_there_and_tests_it(report):
    code, text = report()
    assert code == 0
    assert "Everything that is built is right." in text
    for word in ("torch", "transformers", "instruction set in use", "token_stats, linear_token_stats", "right"):
        assert word in text
    tested = [line.replace("│", " ").split() for line in text.partition("Self-test")[2].splitlines()]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        for backend in backends.serving(torch.device(device)):
            if not backends.unavailable(backend):
                assert [row[:3] for row in tested].count(["token_stats", device, backend]) == 1


def test_says_why_triton_cannot_run(report, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = report()
    assert code == 0
    assert "TRITON_INTERPRET=1" in text


def test_says_why_something_is_missing(report, monkeypatch):
    monkeypatch.setattr(backends.native, "unavailable", "the native module did not load (no such file); build it")
    monkeypatch.setattr(doctor, "installed", lambda name: "")
    code, text = report()
    assert code == 0  # eager still is right
    assert "the native module did not load (no such file)" in text
    assert "missing: pip install torch" in text
    assert "needed for models from GGUF files" in text


def test_a_kernel_that_fails_is_reported(report, monkeypatch):
    def fails(*args):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(backends.native, "finish", fails)
    code, text = report()
    assert code == 1
    assert "RuntimeError: launch failed" in text


def test_a_wrong_kernel_is_caught(report, monkeypatch):
    right = backends.native.finish

    def off_by_a_little(*args):
        stats, saved = right(*args)
        return stats + 0.01, saved

    monkeypatch.setattr(backends.native, "finish", off_by_a_little)
    code, text = report()
    assert code == 1
    assert "wrong" in text
