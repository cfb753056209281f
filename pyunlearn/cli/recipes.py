"""`pyunlearn recipes`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from .._terminal import make_console, print_table
from .shared import Debug, clean_errors

EXAMPLES = """[bold]Examples[/bold]

  # all of them
  pyunlearn recipes

  # one, with its sources and what was published
  pyunlearn recipes npo_kl

  # what a run of it with published settings takes
  pyunlearn recipes npo_kl@phi-1.5-forget05
"""


NONE = "none: its sources give no settings for a model and a data set"


class Plain(yaml.SafeDumper):
    """Every value written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="One of them, also NAME+mrd or NAME@SETTINGS.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """List the methods by name: their terms, sources, and the models and data that settings were published for."""
    with clean_errors(debug):
        from ..recipes import AT, SUFFIX, model_of, names, read, recipe

        console = make_console()
        if name is not None:
            settings = recipe(name)  # which tells unknown names
            chosen, _, published = name.lower().partition(AT)
            file = read(chosen.removesuffix(SUFFIX))
            source = file.published[published]["source"] if published else file.source
            whole: dict[str, Any] = {"summary": file.summary, "source": source, "unlearn": settings}
            if model := model_of(name):
                whole["model"] = model
            if not published:
                whole["published"] = file.published or NONE
            text = yaml.dump(whole, Dumper=Plain, sort_keys=False, allow_unicode=True, width=110)
            command = f"# pyunlearn run recipe:{name} --model MODEL --forget FORGET.jsonl --retain RETAIN.jsonl"
            console.print(f"{command}\n{text}", markup=False, highlight=False, soft_wrap=True, end="")
            return
        title = "pyunlearn run recipe:NAME; NAME+mrd; NAME@SETTINGS for what was published"
        table = Table("recipe", "forget", "retain", "samples drawn", "summary", title=title)
        published_for: dict[str, list[str]] = {}
        for each in names():
            file = read(each)
            terms = [", ".join(term["name"] for term in file.unlearn.get(role, [])) for role in ("forget", "retain")]
            if made := file.unlearn.get("reinforce"):
                terms[0] = ", ".join(filter(None, [terms[0], f"a reinforced model's {made['into']}"]))
            by = file.unlearn.get("sampling", {"by": "shuffle"})["by"]
            drawn = by + (", one an update" if file.unlearn.get("batch_size") == 1 else "")
            table.add_row(each, *terms, drawn, escape(file.summary))
            for settings_of in file.published:
                published_for.setdefault(settings_of, []).append(each)
        print_table(console, table)
        settings_table = Table("SETTINGS", "published for", title="models and shares to forget, as of NAME@SETTINGS")
        for settings_of, having in published_for.items():
            settings_table.add_row(settings_of, ", ".join(having))
        print_table(console, settings_table)
