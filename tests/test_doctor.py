import io

import pytest
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


def test_says_why_something_is_missing(report, monkeypatch):
    monkeypatch.setattr(backends.native, "unavailable", "the native module did not load (no such file); build it")
    monkeypatch.setattr(doctor, "installed", lambda name: "")
    code, text = report()
    assert code == 0  # eager still is right
    assert "the native module did not load (no such file)" in text
    assert "missing: pip install torch" in text
    assert "needed for models from GGUF files" in text


def test_a_wrong_kernel_is_caught(report, monkeypatch):
    right = backends.native.finish

    def off_by_a_little(*args):
        stats, saved = right(*args)
        return stats + 0.01, saved

    monkeypatch.setattr(backends.native, "finish", off_by_a_little)
    code, text = report()
    assert code == 1
    assert "wrong" in text
