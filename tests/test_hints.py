"""What errors tell for a word or a path that is not there."""

import doctest

import pytest

from pyunlearn import _hints
from pyunlearn._hints import check_known, hint, path_hint


def test_docstring_examples():
    result = doctest.testmod(_hints)
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_words():
    check_known("preset", "paper", ["paper", "standard"])
    check_known("role", None, ("forget", None))
    with pytest.raises(ValueError, match=r"^preset='Papr': did you mean paper\? needs one of paper, standard$"):
        check_known("preset", "Papr", iter(["paper", "standard"]))
    with pytest.raises(ValueError, match=r"^option=\['x'\]: needs one of alpha$"):
        check_known("option", ["x"], {"alpha": 1.0})
    assert hint("Paper", []) == "there is none to choose from"


def test_paths(tmp_path):
    (tmp_path / "Forget01.jsonl").touch()
    (tmp_path / "models").mkdir()
    assert path_hint(tmp_path / "forget1.jsonl") == "; did you mean Forget01.jsonl?"
    assert path_hint(tmp_path / "model") == "; did you mean models?"
    assert path_hint(tmp_path / "zzzz") == ""
    assert path_hint(tmp_path / "nowhere" / "forget.jsonl") == f"; the folder {tmp_path / 'nowhere'} does not exist"
