"""The text of `__init__.pyi`: signatures are made at run time, and editors and type checkers read them there.

python -m pyunlearn.objectives.stub    # after an objective, an option or a default has changed
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from . import get, names
from .definition import Definition, signature

HEADER = """\
# Written by python -m pyunlearn.objectives.stub
from typing import Literal, overload

from torch import Tensor

"""


def stub() -> str:
    """What `__init__.py` imports, and every objective as a function: one overload for each set of its parameters."""
    tree = ast.parse(Path(__file__).with_name("__init__.py").read_text(encoding="utf-8"))
    lines = [HEADER]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name not in names()]
            lines += [ast.unparse(node) + "\n"] if node.names else []
        if isinstance(node, ast.Assign):
            listed = "".join(f'    "{name}",\n' for name in ast.literal_eval(node.value))
            lines += [f"\n__all__ = [\n{listed}]\n\n"]
    return "".join([*lines, *(functions(get(name).definition) for name in names())])


def functions(definition: Definition) -> str:
    """The function of one objective; presets with other parameters go before it."""
    usual = definition.default_preset
    presets: dict[tuple[str, ...], list[str]] = {}
    for preset, variant in definition.variants.items():
        presets.setdefault(tuple(signature(variant, preset).parameters), []).append(preset)
    text = ""
    for alike in sorted(presets.values(), key=lambda alike: usual in alike):
        shown = usual if usual in alike else alike[0]
        parameters = signature(definition.variants[shown], shown).parameters.values()
        listed = [str(parameter).replace("torch.", "").replace("'", '"') for parameter in parameters]
        listed.insert([parameter.kind for parameter in parameters].index(inspect.Parameter.KEYWORD_ONLY), "*")
        if shown != usual:
            words = ", ".join(f'"{preset}"' for preset in alike)
            listed = [f"preset: Literal[{words}]" if each.startswith("preset: ") else each for each in listed]
        arguments = "".join(f"    {each},\n" for each in listed)
        text += "@overload\n" if len(presets) > 1 else ""
        text += f"def {definition.name}(\n{arguments}) -> Tensor: ...\n"
    return text


if __name__ == "__main__":
    Path(__file__).with_name("__init__.pyi").write_text(stub(), encoding="utf-8")
