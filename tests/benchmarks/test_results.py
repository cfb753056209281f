"""Records stand until what they measured changes, and those in the repository say where they come from."""

import re

import pytest

from benchmarks.kernels import report
from benchmarks.results import RESULTS, Records, is_ours, name_of, read, units

from .records import KEYS


def test_record_stands_until_what_it_measured_changes(tmp_path):
    file, shape = tmp_path / "logits.json", {"op": "a", "case": "b", "dtype": "c", "N": 1, "V": 2, "H": 0}
    first = Records(file, "one", {"torch": "1"})
    mine, theirs = ({**shape, "impl": impl, "commit": "one", "versions": {"torch": "1"}} for impl in ("cuda", "quack"))
    first.add(mine)
    first.add(theirs)
    assert Records(file, "one", {"torch": "1"}).has(mine)
    later = Records(file, "two", {"torch": "1"})
    assert not later.has(mine)
    assert later.has(theirs)
    assert not Records(file, "one", {"torch": "2"}).has(theirs)
    assert not Records(file, "one", {"torch": "1"}, fresh=True).has(mine)
    later.add({**mine, "commit": "two"})
    assert [r["commit"] for r in read(file)] == ["two", "one"]


def test_committed_results_say_where_they_come_from():
    files = [path for name in report.FILES for path in RESULTS.rglob(f"{name}.json")]
    assert files
    for file in files:
        for name, unit in units(file).items():
            r = unit["value"]
            assert set(r) >= KEYS
            assert name == name_of(r)
            commit = {"commit": r["commit"]} if is_ours(r["impl"]) else {}
            assert unit["identity"] == {"versions": r["versions"], **commit}
            assert r["commit"] != "unknown"
            assert {"torch", "python"} <= set(r["versions"])


@pytest.mark.parametrize("page", sorted(RESULTS.rglob("ops.md")), ids=lambda page: page.parent.name)
def test_committed_pages_are_what_their_records_give(page):
    by_file = {name: read(page.parent / f"{name}.json") for name in report.FILES}
    text = page.read_text()
    drawn = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert text == "\n".join(report.markdown(by_file, drawn)) + "\n"
