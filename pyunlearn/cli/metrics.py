"""`pyunlearn metrics`."""

from __future__ import annotations

import inspect

from rich.markup import escape
from rich.table import Table

from .._terminal import make_console, print_table
from .shared import Debug, clean_errors


def metrics(debug: Debug = False) -> None:
    """List the metrics: what each measures, what it needs, and its options with their defaults; and the suites."""
    with clean_errors(debug):
        from ..metrics import METRICS, SUITES
        from ..runs.files_config import BENCHMARKS

        title = "evaluate.metrics=[NAME, ...], evaluate.options.NAME.OPTION=..., defaults below what it measures"
        needs = (
            "needs: item is the row itself; answer, paraphrase and wrong are its texts as the model reads them; "
            "written is what it answers by itself; after the semicolon: tools, those in brackets may be left out"
        )
        table = Table("name", "what it measures", "needs", title=title, caption=needs, show_lines=True)
        for name, metric in sorted(METRICS.items()):
            tools = [f"({tool})" if tool in metric.optional_tools else tool for tool in metric.tools]
            options = [f"{option} = {default}" for option, default in metric.options.items()]
            needed = [", ".join(each) for each in (metric.needs, tools) if each]
            table.add_row(name, escape("\n".join([metric.summary, *options])), "; ".join(needed))
        print_table(make_console(), table)
        suites = Table("suite", "what it tells", "sets", "zero-shot tasks", title="pyunlearn evaluate --suite NAME")
        for name, suite in SUITES.items():
            sets = [f"({each})" if each in suite.optional else each for each in suite.known_sets]
            suites.add_row(name, escape(suite.summary), ", ".join(sets), ", ".join(suite.tasks))
        print_table(make_console(), suites)
        files = Table("suite", "what the folder --data holds", title="the others take TOFU's files", show_lines=True)
        for name, load in BENCHMARKS.items():
            files.add_row(name, escape(" ".join(inspect.cleandoc(load.__doc__ or "").split())))
        print_table(make_console(), files)
