"""Imports run one way through the house: every one is read from the sources, those in functions and for types too.

Rooms of one level may import each other as long as no circle comes of it; any room may import what is on a level below.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS: list[tuple[str, ...]] = [
    ("cli", "benchmarks", "pyunlearn", "__main__"),  # pyunlearn: its __init__.py, what people import
    ("runs", "doctor"),
    ("report", "scenarios", "integrations"),
    ("training", "calibration"),
    ("mrd", "geffect", "metrics"),
    ("model", "objectives", "gradients"),
    ("ops", "data", "store", "recipes"),
    ("backends",),
    ("contract", "triton_kernels", "_C"),
    ("_files", "_hints", "_hub", "_progress", "_declined", "_terminal", "distributed", "__version__"),
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ARROWS = " -> ".join("{" + ", ".join(rooms) + "}" if len(rooms) > 1 else rooms[0] for rooms in LEVELS)
# Rooms inside ops. contract: what both ops and backends stand on.
INNER = {"backends": "backends", **dict.fromkeys(("contract", "outer_sum", "pieces", "products"), "contract")}
ON_TORCH_ALONE = {"ops", "backends", *LEVELS[-2], *LEVELS[-1]}


class Import(NamedTuple):
    """file: that imports, from the repository's root. importer: its module. module: what it imports."""

    file: str
    line: int
    importer: str
    module: str


def dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: str) -> dict[str, Path]:
    """Module -> file, for a folder of the repository."""
    folders = [ROOT / package, *(path for path in (ROOT / package).iterdir() if path.is_symlink() and path.is_dir())]
    return {dotted(file): file for folder in folders for file in sorted(folder.rglob("*.py"))}


MODULES = {**sources("pyunlearn"), **sources("benchmarks"), **sources("tests")}
NAMES = MODULES.keys() | {"pyunlearn._C", "pyunlearn.__version__"}


def imports_of(source: str, importer: str, is_package: bool, file: str) -> Iterator[Import]:
    """All imports in a source; `from a import b` is one of a.b where that is a module, and of a where it is not."""
    package = importer if is_package else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
            modules = [module if module in NAMES else base for module in modules]
        else:
            continue
        for module in dict.fromkeys(modules):
            yield Import(file, node.lineno, importer, module)


def imports_in(package: str) -> list[Import]:
    return [
        each
        for module, file in MODULES.items()
        if module.split(".")[0] == package
        for each in imports_of(
            file.read_text(encoding="utf-8"), module, file.name == "__init__.py", str(file.relative_to(ROOT))
        )
    ]


def room_of(module: str) -> str | None:
    """None for what is not of pyunlearn."""
    parts = module.split(".")
    if parts[0] != "pyunlearn":
        return None
    if parts[1:2] == ["ops"]:
        return INNER.get("".join(parts[2:3]), "ops")
    return parts[1] if len(parts) > 1 else "pyunlearn"


IMPORTS = imports_in("pyunlearn")


def against_the_arrows(imports: Iterable[Import]) -> list[str]:
    messages = []
    for each in imports:
        importer, imported = room_of(each.importer), room_of(each.module)
        if imported is not None and LEVEL[imported] < LEVEL[importer]:
            messages.append(
                f"{each.file}:{each.line} imports {each.module} (room {imported}) from room {importer}; "
                f"arrows run {ARROWS}"
            )
    return messages


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Each set of places from every one of which arrows lead to every other, of two and more."""
    targets: dict[str, set[str]] = {}
    for start, end in arrows:
        targets.setdefault(start, set()).add(end)

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            for end in targets.get(ahead.pop(), set()) - seen:
                seen.add(end)
                ahead.append(end)
        return seen

    reach = {start: reached(start) for start in targets}
    groups = {tuple(sorted(end for end in reach[start] if start in reach.get(end, ()))) for start in reach}
    return sorted([*group] for group in groups if len(group) > 1)


def test_every_room_has_its_level():
    rooms = {room_of(module) for module in MODULES if module.startswith("pyunlearn")}
    assert rooms >= {"cli", "runs", "training", "mrd", "model", "ops", "backends", "contract", "triton_kernels"}
    assert not rooms - LEVEL.keys(), "give these a level in LEVELS"


def test_imports_run_along_the_arrows():
    assert len(IMPORTS) > 500
    assert not (messages := against_the_arrows(IMPORTS)), "\n" + "\n".join(messages)


@pytest.mark.parametrize("place_of", [room_of, str], ids=["rooms", "files"])
def test_no_circles(place_of):
    inside = [each for each in IMPORTS if room_of(each.module)]
    arrows = [(place_of(each.importer), place_of(each.module)) for each in inside]
    messages = []
    for circle in circles(arrows):
        messages.append(" <-> ".join(circle))
        for each, (start, end) in zip(inside, arrows, strict=True):
            upwards = LEVEL[room_of(each.module)] <= LEVEL[room_of(each.importer)]  # every circle has some
            if upwards and start != end and {start, end} <= {*circle}:
                messages.append(f"  {each.file}:{each.line} imports {each.module}")
    assert not messages, "\n" + "\n".join(messages)


def test_what_stands_on_torch_alone():
    """The ops and all below them know nothing of models' libraries."""
    users = [each for each in IMPORTS if room_of(each.importer) in ON_TORCH_ALONE]
    assert len(users) > 100
    assert not [f"{each.file}:{each.line}" for each in users if re.match(r"(transformers|peft|trl)\b", each.module)]


@pytest.mark.parametrize(("package", "others"), [("pyunlearn", ("benchmarks", "tests")), ("benchmarks", ("tests",))])
def test_the_package_knows_nothing_of_its_users(package, others):
    imports = imports_in(package)
    assert imports
    assert not [f"{each.file}:{each.line}" for each in imports if each.module.split(".")[0] in others]


# ---- what reads them -------------------------------------------------------------------------------------------------

SOURCE = """
import os
import pyunlearn.runs.config as settings
from typing import TYPE_CHECKING
from .. import __version__, ops, objectives as o
from . import near
from .near import x
from ..ops.contract import Options, Other
if TYPE_CHECKING:
    from ..training import trainer
def f():
    from pyunlearn import _C
"""


def test_imports_are_read_in_any_form():
    imports = list(imports_of(SOURCE, "pyunlearn.model.head", False, "head.py"))
    modules = [(each.line, each.module) for each in imports]
    assert sorted(modules) == [
        (2, "os"), (3, "pyunlearn.runs.config"), (4, "typing"), (5, "pyunlearn.__version__"),
        (5, "pyunlearn.objectives"), (5, "pyunlearn.ops"), (6, "pyunlearn.model"), (7, "pyunlearn.model.near"),
        (8, "pyunlearn.ops.contract"), (10, "pyunlearn.training.trainer"), (12, "pyunlearn._C"),
    ]  # fmt: skip
    package = list(imports_of("from . import x\nfrom .. import ops", "pyunlearn.model", True, "model/__init__.py"))
    assert [each.module for each in package] == ["pyunlearn.model", "pyunlearn.ops"]


def test_an_import_against_the_arrows_is_told():
    imports = list(imports_of(SOURCE, "pyunlearn.model.head", False, "pyunlearn/model/head.py"))
    messages = against_the_arrows(imports)
    assert [message.split(" (")[0] for message in messages] == [
        "pyunlearn/model/head.py:3 imports pyunlearn.runs.config",
        "pyunlearn/model/head.py:10 imports pyunlearn.training.trainer",
    ]
    assert "(room runs) from room model; arrows run {cli, " in messages[0]


def test_circles_are_seen():
    assert circles(["ab", "bc", "ca", "cd", "de", "ed", "xx", "xa"]) == [["a", "b", "c"], ["d", "e"]]
    assert circles(["ab", "bc", "ac"]) == []


# ---- the native sources ----------------------------------------------------------------------------------------------

INCLUDES = {"tensor": {"tensor", "math"}, "math": {"tensor", "math"}, "cpu": {"cpu", "tensor", "math"},
            "cuda": {"cuda", "tensor", "math"}}  # fmt: skip


def test_cpu_and_cuda_do_not_include_each_other():
    messages, arrows = [], []
    for file in sorted((ROOT / "csrc").rglob("*.*")):
        folder = file.relative_to(ROOT / "csrc").parts[0]
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            include = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            if include is None or folder not in INCLUDES:
                continue
            header = (file.parent / include[1]).resolve()
            assert header.is_file(), f"{file}:{number}"
            arrows.append((folder, header.relative_to(ROOT / "csrc").parts[0]))
            if arrows[-1][1] not in INCLUDES[folder]:
                messages.append(f"{file.relative_to(ROOT)}:{number} includes {include[1]}")
    assert len(arrows) > 20
    assert not messages, "\n" + "\n".join(messages)
    assert not circles(arrows)
