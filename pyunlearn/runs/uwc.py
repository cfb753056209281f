"""The job of `pyunlearn calibrate uwc`: how much of a run's unlearning may stay (`calibration.uwc`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .._files import write_json, write_text
from .._terminal import visible
from ..calibration import Search, mix, scale_adapter, search
from ..calibration.uwc import is_plain
from ..report.calibrate import render_uwc
from .job import loaded
from .pair import Means, Pair, few, opened, tell_next, tell_table, three_columns
from .provenance import describe

METHOD, SCORE = "uwc", "extraction_strength"
LITTLE = 0.1  # extraction strength, below which there is little to hold on to
BACK = 0.9  # of the forget set's extraction strength before: what is above has not been forgotten


@dataclass(frozen=True)
class UWCResult:
    """search: every a that was measured. rows: of text, before, unlearned, calibrated. warnings: what may mislead."""

    folder: Path
    search: Search
    kept_set: str
    rows: list[dict[str, Any]]
    warnings: list[str]

    @property
    def a(self) -> float:
        return self.search.a


class Mixtures:
    """The models between the two, one at a time in memory. An adapter is scaled, its base is loaded each time; other
    models are mixed in place from files."""

    def __init__(self, pair: Pair):
        self.pair = pair
        adapter = pair.adapter
        self.scaled = adapter is not None and is_plain(adapter)
        self.mixing: tuple[Any, ...] = ()

    def at(self, a: float) -> tuple[Any, Any]:
        """Model and tokenizer; the two ends are as the run has them."""
        pair = self.pair
        if self.scaled:
            if a in (0, 1):
                return loaded(pair.job, pair.after) if a else pair.load_before()
            assert pair.adapter is not None
            scale_adapter(pair.adapter, pair.work / "scaled", a)
            return loaded(pair.job, pair.model_in(pair.work / "scaled"))
        if not self.mixing:
            self.mixing = pair.tensors()
        model, tokenizer, before, after = self.mixing
        mix(model, before, after, a)
        return model, tokenizer

    def write(self, a: float) -> tuple[Any, Any]:
        """The checkpoint, and its model."""
        pair = self.pair
        if self.scaled:
            assert pair.adapter is not None
            scale_adapter(pair.adapter, pair.place.checkpoint, a)
        model, tokenizer = self.at(a)
        if not self.scaled:
            pair.write_checkpoint(model, tokenizer)
        return model, tokenizer


def calibrate_uwc(
    path: str | Path,
    *,
    target: float = 0.95,
    on: str | None = None,
    points: int = 10,
    tolerance: float = 0.01,
    console: Console | None = None,
    command: str = "pyunlearn calibrate uwc",
) -> UWCResult:
    """The mixture of a finished run's models before and after with the most unlearning whose extraction strength on
    what should stay is `target` of the model's before, written into the run's folder uwc/ (see `pair`).

    on: "retain", or "holdout", rows that the unlearning has not seen: by default those that the run's verdict is told
    of. points, tolerance: of `search`. What has been measured is kept, for another target too.

    Raises what `search`, `pair.opened` and `Pair.kept_set` raise.
    """
    search(lambda a: 1 - a, target, points=points, tolerance=tolerance)  # whether they are numbers to search by
    with opened(path, METHOD, console, command) as pair:
        name = pair.kept_set(on)
        every = pair.sets()
        sets = {each: every[each] for each in ("forget", name)}
        store, identity, mixtures = pair.store(), pair.identity(sets), Mixtures(pair)
        job = pair.job
        found: dict[float, Means] = {}

        def score(a: float) -> float:
            found[a] = store.compute(f"a-{a:.6f}", {**identity, "a": a}, lambda: pair.means(*mixtures.at(a), sets))
            kept, gone = (found[a][each][SCORE] for each in (name, "forget"))
            job.console.print(f"a = {a:<8g} extraction strength: {name} {kept:.4f}, forget {gone:.4f}", highlight=False)
            return kept

        result = search(score, target, points=points, tolerance=tolerance)
        curve = [{"a": a, **found[a]} for a in result.scores]
        counts = {each: len(items) for each, items in sets.items()}
        warnings = warn(result, found, name, bool(job.config.unlearn.retain), counts)
        pair.begin_result()
        table, unlearned, rows_of = pair.evaluate(*mixtures.write(result.a))
        calibration = {"method": METHOD, "a": result.a, "target": target, "on": name}
        rows = three_columns(table, unlearned)
        numbers = {
            **calibration,
            "u": 1 - result.a,
            "limit": result.limit,
            "monotone": result.monotone,
            "warnings": warnings,
        }
        write_json(pair.place.path / "uwc.json", {**numbers, "curve": curve})
        made = describe(job.config, pair.attempts, {"calibration": told(result, target, name)})
        verdict = pair.judge(table, rows_of)[1]
        page = render_uwc(job.config.name, result, target, name, curve, rows, warnings, made, verdict)
        write_text(pair.place.report, page)
        pair.write(calibration, table, rows_of)
    tell(pair, result, name, target, rows, warnings, verdict)
    return UWCResult(pair.place.path, result, name, rows, warnings)


def told(result: Search, target: float, name: str) -> str:
    return (
        f"UWC, a = {result.a:g} (u = {1 - result.a:g}), the largest that keeps {target:.0%} of the extraction strength "
        f"of {name} rows"
    )


def warn(
    result: Search, found: Mapping[float, Means], name: str, rehearsed: bool, counts: Mapping[str, int]
) -> list[str]:
    """What may mislead in it, plainly."""
    before, gone, left = found[0.0], found[0.0]["forget"][SCORE], found[result.a]["forget"][SCORE]
    warnings = few(counts)
    if name == "retain" and rehearsed:
        warnings.append(
            "the retain rows are those that the unlearning rehearsed: other rows may have lost more than this tells; "
            "data.holdout keeps some out"
        )
    if before[name][SCORE] < LITTLE:
        warnings.append(
            f"extraction strength of {name} rows is {before[name][SCORE]:.3f} before unlearning: the model knows "
            "little of them, and little is held on to"
        )
    if result.a == 0:
        warnings.append("no mixture keeps as much as was asked: a = 0 is the model before, and nothing is forgotten")
    elif left > BACK * gone:
        warnings.append(
            f"at this a the forget rows are back: extraction strength {left:.3f}, {gone:.3f} before unlearning"
        )
    if result.a == 1:
        warnings.append("the unlearned model keeps as much as was asked: it is left as it is, a = 1")
    if not result.monotone:
        warnings.append(
            "extraction strength does not fall all the way with a: some smaller a keeps less than was asked"
        )
    return warnings


def tell(
    pair: Pair,
    result: Search,
    name: str,
    target: float,
    rows: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    verdict: Mapping[str, Any] | None,
) -> None:
    console = pair.job.console
    tell_table(console, rows, "before, unlearned and calibrated")
    console.print(
        f"[bold]a = {result.a:g}[/]: the largest that keeps {target:.0%} of the extraction strength of {name} rows "
        f"(u = {1 - result.a:g}, the original's part, in the authors' code)",
        highlight=False,
    )
    for warning in warnings:
        console.print(f"note: {visible(warning)}", highlight=False, markup=False)
    tell_next(pair, verdict)
