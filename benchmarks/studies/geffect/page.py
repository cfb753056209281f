"""The page beside the figures: which of the paper's observations hold on this model, computed from the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pyunlearn._files import write_text

from .figures import FIGURES, Records, finite
from .observations import OBSERVATIONS, cost, number, summed
from .runs import Record, median


def write(records: Records, out: Path) -> Path:
    """README.md in `out`, from the records of all runs."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                              keep_trailing_newline=True)  # fmt: skip
    environment.filters["number"] = number
    checked = [(each, *each.check(records)) for each in OBSERVATIONS]
    first = records["ga"]
    text = environment.get_template("page.md").render(
        first=first,
        records=records,
        unlearning=first["settings"]["unlearn"],
        probe=first["settings"]["geffect"],
        blocks=first["settings"]["model"]["options"].get("num_hidden_layers", 3),
        steps=finite(first)[-1]["step"],
        before=finite(first)[0]["nll"],
        seconds=median([record["seconds_a_probe"] for record in records.values()]),
        checked=checked,
        held=sum(holds for _, holds, _ in checked),
        rows=list(map(row, records.values())),
        figures=FIGURES,
    )
    path = out / "README.md"
    write_text(path, text)
    return path


def row(record: Record) -> dict[str, Any]:
    risk = finite(record)[-1]["nll"]
    numbers = [summed(record, "unlearn"), summed(record, "retain"), cost(record), risk["unlearn"], risk["retain"]]
    return {"name": record["name"], "stopped": record["stopped"], "numbers": numbers}
