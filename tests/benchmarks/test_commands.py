"""The front door, and the commands that pages, scripts and docs of this repository name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command

ROOT = Path(__file__).parent.parent.parent


def test_commands_in_the_repository_are_there():
    files = [ROOT / "README.md", ROOT / "Makefile"]
    files += [path for kind in ("py", "sh", "md", "yaml") for path in (ROOT / "benchmarks").rglob(f"*.{kind}")]
    pages = [*(ROOT / "docs").glob("*.md")]
    named = {
        (name, path) for path in [*files, *pages] for name in re.findall(r"-m (benchmarks[.\w]*\w)", path.read_text())
    }
    assert len({name for name, _ in named}) >= 6
    assert len({name for name, path in named if path in pages}) >= 6
    for name, path in named:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{path}: {name}"
        main = f"{name}.__main__" if spec.submodule_search_locations else name
        assert "def main(" in Path(importlib.util.find_spec(main).origin).read_text(), f"{path}: {name}"


def test_an_unknown_part_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "logit"])
    with pytest.raises(SystemExit):
        command.main()
    assert "part='logit': did you mean logits? needs one of cpu, logits" in capsys.readouterr().err


def test_kernels_are_measured_without_transformers():
    """A GPU machine may have torch and triton alone."""
    code = "import sys; sys.modules['transformers'] = sys.modules['matplotlib'] = None; import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
