"""`pyunlearn objectives`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .shared import Debug, clean_errors


def objectives(debug: Debug = False) -> None:
    """List the objectives (role, what each needs, its options with their defaults) and the recipes made of them."""
    with clean_errors(debug):
        from ..objectives import table as objective_table
        from ..recipes import names, read

        table = Table("name", "role", "what it does", "options and defaults", "presets")
        for row in objective_table():
            options = "\n".join(f"{key} = {value}" for key, value in row.defaults.items() if key != "preset")
            table.add_row(row.name, row.role, escape(row.summary), escape(options), escape("\n".join(row.presets)))
        Console().print(table)
        recipes = Table("recipe", "forget", "retain", "samples drawn", title="unlearn.recipe=NAME, or NAME+mrd")
        for name in names():
            settings = read(name).unlearn
            terms = [", ".join(term["name"] for term in settings[role]) for role in ("forget", "retain")]
            by = settings.get("sampling", {"by": "shuffle"})["by"]
            recipes.add_row(name, *terms, by + (", one an update" if settings.get("batch_size") == 1 else ""))
        Console().print(recipes)
