"""What errors tell for a word or a path that is not there."""

import doctest

import pytest

from pyunlearn import _hints
from pyunlearn._hints import check_known, hint, near, path_hint


def test_docstring_examples():
    result = doctest.testmod(_hints)
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_near_names_the_nearest_first():
    known = ["paper", "standard", "Papers", "none"]
    assert near("papr", known) == ["paper", "Papers"]
    assert near("PAPER", known)[0] == "paper"
    assert near("xyz", known) == []
    assert near(None, [None, 1]) == ["None"]


def test_a_hint_names_all_there_is():
    assert hint("xyz", ["b", "a"]) == "needs one of b, a"
    assert hint("Paper", []) == "there is none to choose from"


def test_what_is_known_passes_and_the_rest_is_named():
    check_known("preset", "paper", iter(["paper", "standard"]))
    check_known("role", None, ("forget", None))
    with pytest.raises(ValueError, match=r"^preset='Papr': did you mean paper\? needs one of paper, standard$"):
        check_known("preset", "Papr", iter(["paper", "standard"]))
    with pytest.raises(ValueError, match=r"^option=\['x'\]: needs one of alpha$"):
        check_known("option", ["x"], {"alpha": 1.0})


def test_paths(tmp_path):
    (tmp_path / "Forget01.jsonl").touch()
    (tmp_path / "models").mkdir()
    assert path_hint(tmp_path / "forget1.jsonl") == "; did you mean Forget01.jsonl?"
    assert path_hint(tmp_path / "model") == "; did you mean models?"
    assert path_hint(tmp_path / "zzzz") == ""
    assert path_hint(tmp_path / "nowhere" / "forget.jsonl") == f"; the folder {tmp_path / 'nowhere'} does not exist"
