"""The examples of the README and the sessions of docs run as they stand; their commands are ones that there are."""

import doctest
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
from typer.main import get_command

from pyunlearn.cli import app
from pyunlearn.runs.request import run_config

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README = PAGES["README.md"]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SESSIONS = {name: "".join(re.findall(r"```pycon\n(.*?)```", page, flags=re.DOTALL)) for name, page in PAGES.items()}
TEXT = "".join(PAGES.values()).replace("\\\n", "")
SHELL = "".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL))
COMMANDS = re.findall(r"^    (pyunlearn \w.*)", TEXT, re.MULTILINE) + re.findall(
    r"^(pyunlearn .*)", SHELL, re.MULTILINE
)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", [name for name, session in SESSIONS.items() if session])
def test_session_says_what_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest(SESSIONS[name], {}, name, None, 0)
    assert doctest.DocTestRunner().run(session).failed == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = list(takewhile(lambda word: word not in ("&&", "||", "..."), shlex.split(command, comments=True)))
    taken = get_command(app).commands[words[1]].make_context(words[1], words[2:]).params  # raises for a wrong option
    if words[1] == "run":
        given = ("recipe", "columns", "lora", "model", "forget", "retain", "gguf_file", "prompt")
        source = taken["source"] if (taken["source"] or "").startswith(("recipe:", "examples/")) else None
        unlearn = run_config(source, taken["set_"] or [], **{name: taken[name] for name in given}).unlearn
        assert unlearn.forget or unlearn.reinforce


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
