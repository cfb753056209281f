"""A configuration as a file to edit: what is set, and as comments every other key, its default and what it means."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import RunConfig

WIDTH = 110


def commented(config: RunConfig, command: str) -> str:
    """YAML that `load_config` reads as `config`, every key in it. command: that runs it."""
    return "\n".join([f"# {command}", "", *section_lines(config, "")]) + "\n"


def section_lines(section: BaseModel, indent: str) -> Iterator[str]:
    set_here = section.model_dump(mode="json", exclude_defaults=True)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        about = field.description or ""
        if isinstance(value, BaseModel):
            inside = list(section_lines(value, indent + "  "))
            alone = all(line.lstrip().startswith("#") for line in inside)
            yield from about_lines(about, indent)
            yield f"{indent}{'# ' if alone else ''}{name}:"
            yield from inside
        else:
            yield from about_lines(about or absent_section(field, value), indent)
            mark = "" if name in set_here else "# "
            yield f"{indent}{mark}{entry(name, section.model_dump(mode='json')[name])}"
        if indent == "":
            yield ""


def about_lines(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def absent_section(field: FieldInfo, value: Any) -> str:
    """What a section that is left out would be for: the first line of its class."""
    kinds = [kind for kind in getattr(field.annotation, "__args__", ()) if isinstance(kind, type)]
    own = [kind for kind in kinds if issubclass(kind, BaseModel)]
    return (inspect.getdoc(own[0]) or "").partition("\n")[0] if value is None and own else ""


def entry(name: str, value: Any) -> str:
    """`name: value` on one line."""
    listed = yaml.safe_dump([brief(value)], default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{name}: {listed.strip()[1:-1]}"


def brief(value: Any) -> Any:
    """Without what is null or empty in the sections of a list, as terms have it."""
    if isinstance(value, list):
        return [brief(each) for each in value]
    if isinstance(value, Mapping) and "name" in value and "coefficient" in value:
        return {key: each for key, each in value.items() if each not in (None, {}, 1.0)}
    return value
