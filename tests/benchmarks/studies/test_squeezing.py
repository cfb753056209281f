"""The study at a tiny size, and its numbers on ways that are known."""

from __future__ import annotations

import json

import pytest

from benchmarks.studies import squeezing
from benchmarks.studies.squeezing import Way, change, first_fall, squeezed

SHORT = ["memorise.epochs=2", "unlearn.max_steps=3", "evaluate.max_new_tokens=6"]


def test_every_way_is_on_the_page_and_nothing_is_done_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(squeezing, "METHODS", {name: squeezing.METHODS[name] for name in ("GA", "BS-T")})
    words = ["--toy", "--seeds", "1", "--beams", "5", "--moments", "3", "--out", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), *(word for each in SHORT for word in ("--set", each))]
    squeezing.main(words)
    ways = json.loads((tmp_path / "out/squeezing/embedded.json").read_text())
    for (way,) in ways.values():
        assert way["steps"] == [0, 1, 2, 3]
        assert set(way["logp"]) == {"target", "high", "middle", "low"}
        assert all(len(values) == 8 for line in way["logp"].values() for values in line)  # questions
        assert all(value <= 0 for value in way["logp"]["target"][0])
    assert ways["GA"][0]["logp"]["target"][0] == ways["BS-T"][0]["logp"]["target"][0]  # of one start
    page = (tmp_path / "out/squeezing/embedded.md").read_text()
    assert page.count("| GA, step") == 2
    assert (tmp_path / "out/squeezing/embedded.svg").is_file()
    monkeypatch.setattr(squeezing, "follow", lambda *_: pytest.fail("all is there"))
    squeezing.main(words)
    assert (tmp_path / "out/squeezing/embedded.md").read_text() == page


def test_changes_are_of_the_questions_that_have_candidates():
    way = Way([0, 5, 10], {"target": [[-1.0, -1.0], [-1.1, -1.3], [-3.0, -0.5]],
                           "high": [[-2.0, None], [-1.5, None], [-2.5, None]]})  # fmt: skip
    assert first_fall([way]) == 1
    assert change([way], "high", 1).mean == pytest.approx(0.5)
    assert change([way], "high", 1).num_samples == 1  # one question has none
    assert change([way], "target", 2).mean == pytest.approx((-2.0 + 0.5) / 2)
    assert squeezed([way], 1) == 1.0
    assert squeezed([way], 2) == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["embeded"], "world='embeded': did you mean embedded"), (["--beams", "4"], "--beams 4: needs 5 or more"),
     (["--moments", "0"], "--moments 0: needs 1 or more")],
)  # fmt: skip
def test_what_does_not_fit(words, message, capsys):
    with pytest.raises(SystemExit):
        squeezing.main(words)
    assert message in capsys.readouterr().err
