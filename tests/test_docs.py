"""The pages in docs: their examples run as they stand, after the page's first, and their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OPTIONAL = ("trl", "lightning")


def sections(page):
    """(title, Python of the section), the examples of one section in one piece."""
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        code = "\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
        if code:
            yield section.split("\n")[0], code


CASES = [(page, title) for page in PAGES for title, _ in sections(page)]


def test_there_are_examples():
    assert len(CASES) >= 7


@pytest.mark.parametrize(("page", "title"), CASES, ids=[f"{page.stem}-{title}" for page, title in CASES])
def test_example_runs(page, title, tmp_path, monkeypatch):
    """After the page's beginning, where what all share is made."""
    monkeypatch.chdir(tmp_path)
    pieces = dict(sections(page))
    for name in OPTIONAL:
        if re.search(rf"^(import|from) {name}\b", pieces[title], re.MULTILINE) and find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    beginning = next(iter(pieces))
    names = {"__name__": "docs"}
    for piece in dict.fromkeys((beginning, title)):
        exec(compile(pieces[piece], f"{page.name}: {piece}", "exec"), names)


def test_the_tour_runs(tmp_path):
    """Every block of it, in its order, in one shell."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/tour.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 7
    python = shlex.quote(sys.executable)
    begin = f'set -e\npyunlearn() {{ {python} -m pyunlearn "$@"; }}\npython() {{ {python} "$@"; }}\n'
    environment = {**os.environ, "PYUNLEARN_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", begin + "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "error:" not in done.stderr, done.stderr
    assert done.stdout.count("verdict: ") == 4
    for made in ("forget-refuse/report.html", "second/report.html", "third/report.html", "comparison/compare.html"):
        assert (tmp_path / "runs" / made).is_file(), made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page):
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"\btests/[\w/]+\.py\b", text):
        assert (ROOT / file).is_file(), file
