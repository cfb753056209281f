"""The records of a device -> ops.md and figures beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...results import Record, read
from .. import targets
from . import table

FILES = ("ops", "logits", "linear", "weights", "step")


def write(folder: Path) -> None:
    """Writes what the records in `folder` show; prints the part that fits on a screen."""
    by_file = {name: read(folder / f"{name}.json") for name in FILES}
    records = [record for part in by_file.values() for record in part]
    if not any(record["time_ms"] for record in records):
        print(f"no measurement in {folder}")
        return
    drawn: list[str] = []
    if by_file["logits"] and importlib.util.find_spec("matplotlib"):
        from . import figures

        drawn = [path.name for path in figures.write(by_file["logits"], folder)]
    (folder / "ops.md").write_text("\n".join(markdown(by_file, drawn)) + "\n")
    print("\n".join([*targets.markdown(records), ""] if gpu(by_file) else table.by_case(by_file["ops"])))
    print(f"wrote {folder / 'ops.md'}; figures: {', '.join(drawn) or 'none'}")


def markdown(by_file: dict[str, list[Record]], drawn: list[str]) -> list[str]:
    records = [record for part in by_file.values() for record in part]
    lines = table.heading([record for record in records if record["op"] != "step"] or records)
    if gpu(by_file):
        lines += targets.markdown(records)
    lines += table.by_case(by_file["ops"])
    lines += table.by_shape(by_file["logits"])
    lines += ["", *(f"![{name}]({name})" for name in drawn)] if drawn else []
    lines += table.by_case(by_file["linear"] + by_file["weights"]) + table.steps(by_file["step"])
    return lines + table.notes(records)


def gpu(by_file: dict[str, list[Record]]) -> bool:
    return any(by_file[name] for name in FILES[1:])
