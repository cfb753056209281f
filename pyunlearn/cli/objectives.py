"""`pyunlearn objectives`."""

from __future__ import annotations

from inspect import signature

from rich.markup import escape
from rich.table import Table

from .._terminal import make_console, print_table
from .shared import Debug, clean_errors


def objectives(debug: Debug = False) -> None:
    """List the objectives (role, options with their defaults) and their presets; pyunlearn recipes lists methods."""
    with clean_errors(debug):
        from ..objectives import MIXTURES
        from ..objectives import table as objective_table

        table = Table("name", "role", "what it does", "options and defaults")
        title = "unlearn.forget.preset=NAME; unlearn.forget.reduction=paper reduces as the paper's equation does"
        presets = Table("objective", "preset", "what it changes, and how it is reduced", title=title)
        for row in objective_table():
            options = "\n".join(f"{key} = {value}" for key, value in row.defaults.items() if key != "preset")
            if row.paper_reduction != row.defaults["reduction"]:
                options += f"\n(the paper's: {row.paper_reduction})"
            table.add_row(row.name, row.role, escape(row.summary), escape(options))
            for preset, changes in row.presets.items():
                presets.add_row(row.name, preset, escape(changes.removeprefix("as above; ")))
        for name, mixture in MIXTURES.items():
            parameters = signature(mixture).parameters.values()
            defaults = [f"{each.name} = {each.default}" for each in parameters if each.kind is each.KEYWORD_ONLY]
            table.add_row(
                name, "forget", escape((mixture.__doc__ or name).partition("\n")[0]), escape("\n".join(defaults))
            )
        print_table(make_console(), table)
        print_table(make_console(), presets)
