"""Near names in errors."""

import doctest

import pytest

from pyunlearn import _hints


def test_near_names_the_nearest_first():
    known = ["paper", "standard", "Papers", "none"]
    assert _hints.near("papr", known) == ["paper", "Papers"]
    assert _hints.near("PAPER", known)[0] == "paper"
    assert _hints.near("xyz", known) == []
    assert _hints.near(None, [None, 1]) == ["None"]


def test_a_hint_names_all_there_is():
    assert _hints.hint("xyz", ["b", "a"]) == "needs one of b, a"
    assert _hints.hint("xyz", []) == "there is none to choose from"


def test_what_is_known_passes_and_the_rest_is_named():
    _hints.check_known("preset", "paper", iter(["paper", "standard"]))
    with pytest.raises(ValueError, match=r"^preset='papr': did you mean paper\? needs one of paper, standard$"):
        _hints.check_known("preset", "papr", iter(["paper", "standard"]))


def test_docstring_examples():
    assert doctest.testmod(_hints) == (0, 2)
