"""The README's Python examples run as they stand, and it shows the commands that the Makefile has."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from pyunlearn.runs import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", re.findall(r"^    (pyunlearn run .*)", README.replace("\\\n", ""), re.MULTILINE))
def test_runs_are_configured(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[2:]
    overrides = [word for before, word in pairwise(words) if before == "--set"]
    files = [word for word in words if word.endswith(".yaml")]
    assert load_config(files[0] if files else None, overrides).unlearn.forget


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
