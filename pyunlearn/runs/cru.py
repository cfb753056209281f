"""The job of `pyunlearn calibrate cru`: which layers of an unlearned model to keep (`calibration.cru`)."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from .._files import write_json, write_text
from .._hints import check_known
from .._progress import track
from .._terminal import print_table, visible
from ..calibration import choose_count, components, influence_order, stored
from ..calibration.cru import KINDS, REST, changed, load
from ..data import QA
from ..metrics import forget_quality, model_utility
from ..metrics.utility import mean, true_better
from ..report.calibrate import render_cru
from ..store import digest_json
from .evaluate import read_lines
from .pair import Pair, examine, few, opened, tell_next, tell_table, three_columns
from .provenance import describe

METHOD = "cru"
UTILITIES = {
    "probability": "mean probability of the retain answers",
    "model_utility": "TOFU's, of retain rows, real authors and world facts",
}
FORGETTINGS = {
    "forgotten": "1 - mean probability of the forget answers",
    "forget_quality": "ln of the KS p-value of truth ratios against the retrained model's",
}
OTHERS = ("real_authors", "world_facts")  # sets that TOFU's model utility needs
FEWEST, AGREES = 4, 0.5  # components whose order can be told to be noise; the rank correlation below which it is
Score = tuple[float, float]  # utility, forgetting


@dataclass(frozen=True)
class CRUResult:
    """order: (component, rank sum), the best first. influence: (utility, forgetting) of each component alone. curve:
    of the hybrids by k. counts: validation rows. rows: of text, of the other rows. warnings: what may mislead."""

    folder: Path
    k: int
    order: list[tuple[str, float]]
    influence: dict[str, Score]
    curve: list[Score]
    counts: dict[str, int]
    rows: list[dict[str, Any]]
    warnings: list[str]

    @property
    def chosen(self) -> list[str]:
        """Components that come from the unlearned model."""
        return [name for name, _ in self.order[: self.k]]


class Hybrids:
    """The one model in memory: the original, with some components from the unlearned one."""

    def __init__(self, pair: Pair, kind: str):
        self.model, self.tokenizer, self.before, self.after = pair.tensors()
        parts = components(self.model, kind)
        names = {name: every for name, (_, every) in stored(self.model).items()}
        differ = changed(parts, names, self.before, self.after)
        self.parts = {name: parts[name] for name in parts if name in differ}
        if not self.parts.keys() - {REST}:
            raise ValueError(
                f"component={kind}: unlearning has changed none of {pair.job.folder.path}; nothing is to choose"
            )
        self.now: set[str] = set()

    def become(self, taken: Collection[str]) -> tuple[Any, Any]:
        """Model and tokenizer with these components, and no others, from the unlearned model."""
        for part in self.now ^ {*taken}:
            load(self.model, self.after if part in taken else self.before, self.parts[part])
        self.now = {*taken}
        return self.model, self.tokenizer


@dataclass(frozen=True)
class Measures:
    """Utility and forgetting of a model, on validation rows; higher is better in both."""

    pair: Pair
    utility: str
    forgetting: str
    sets: dict[str, list[QA]]

    @property
    def metrics(self) -> dict[str, list[str]]:
        wanted = {name: ["probability"] for name in self.sets}
        if self.utility == "model_utility":
            wanted["retain"] += ["rouge_l", "truth_ratio"]
            wanted |= {name: ["probability_w_options", "rouge_l", "truth_ratio"] for name in OTHERS}
        if self.forgetting == "forget_quality":
            wanted["forget"].append("truth_ratio")
        return wanted

    def of(self, model: Any, tokenizer: Any) -> list[Score]:
        """On all rows, and on every other one from the first and from the second on: whether halves agree."""
        found = examine(self.pair.job, model, tokenizer, self.sets, self.metrics)
        parts = [slice(None)]
        if all(len(own.records) > 1 for own in found.values()):
            parts += [slice(0, None, 2), slice(1, None, 2)]
        return [self.reduce({name: own.records[part] for name, own in found.items()}) for part in parts]

    def reduce(self, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Score:
        values = {
            (name, metric): [record[metric] for record in own if record.get(metric) is not None]
            for name, own in records.items()
            for metric in self.metrics[name]
        }
        utility = mean(values["retain", "probability"])
        if self.utility == "model_utility":
            of = {key: own for key, own in values.items() if key[0] != "forget"}
            reduced = {key: true_better(own) if key[1] == "truth_ratio" else mean(own) for key, own in of.items()}
            utility = model_utility({" ".join(key): value for key, value in reduced.items()
                                     if key[0] == "retain" or key[1] != "probability"})  # fmt: skip
        if self.forgetting == "forgotten":
            return utility, 1 - mean(values["forget", "probability"])
        found_p = forget_quality(values["forget", "truth_ratio"], retrained_ratios(self.pair))
        return utility, max(found_p.ln_p, math.log(sys.float_info.min))


def calibrate_cru(
    path: str | Path,
    *,
    component: str = "layer",
    target: float = 0.9,
    validation: float = 0.2,
    utility: str | None = None,
    forgetting: str | None = None,
    console: Console | None = None,
    command: str = "pyunlearn calibrate cru",
) -> CRUResult:
    """The hybrid of a finished run's models before and after, chosen by `calibration.cru` and written into the run's
    folder cru/ (see `pair`).

    component: of `calibration.cru.KINDS`. validation: share of the forget and retain rows, drawn with the run's seed,
    that it is chosen by; the tables are of the other rows. target: share of what the unlearned model forgets that the
    hybrid has to. utility, forgetting: of UTILITIES and FORGETTINGS; None takes TOFU's where the run has what they
    need: sets real_authors and world_facts with perturbed answers; truth_ratio of a retrained model (--retrain).

    Raises what `choose_count`, `components`, `pair.opened` and `Pair.tensors` raise; ValueError for an unknown measure,
    one that the run does not allow, or too few rows.
    """
    check_known("component", component, KINDS)
    choose_count([(1.0, 0.0), (0.0, 1.0)], target)  # whether it is a share
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation:g}: needs a share of the rows, between 0 and 1")
    with opened(path, METHOD, console, command) as pair:
        job, drawn = pair.job, draw(pair, validation)
        sets = {name: [items[i] for i in drawn[name]] for name, items in pair.sets().items() if name in drawn}
        measures = Measures(pair, *choose_measures(pair, utility, forgetting), sets)
        if measures.utility != "model_utility":
            for name in OTHERS:
                sets.pop(name, None)
                drawn.pop(name, None)
        identity = {**pair.identity(sets), "utility": measures.utility, "forgetting": measures.forgetting}
        store, hybrids = pair.store(), Hybrids(pair, component)
        if measures.forgetting == "forget_quality":
            identity["retrained"] = digest_json(retrained_ratios(pair))

        def scores(taken: Sequence[str]) -> list[Score]:
            names = sorted(taken)
            unit = f"{component}-halves-{digest_json(names)[:16]}"
            found = store.compute(unit, {**identity, "parts": names}, lambda: measures.of(*hybrids.become(taken)))
            return [(utility, forgetting) for utility, forgetting in found]

        def score(taken: Sequence[str]) -> Score:
            return scores(taken)[0]

        show = not job.console.quiet
        original, whole = score(()), score([*hybrids.parts])
        try:
            choose_count([original, whole], target)  # whether there is anything to choose by
        except ValueError as error:
            other = "" if measures.forgetting == "forgotten" else "; by probabilities: --forgetting forgotten"
            raise ValueError(f"forgetting={measures.forgetting}: {error}{other}") from None
        alone = {part: scores((part,)) for part in track([*hybrids.parts], f"{component}s", show, size=lambda _: 1)}
        influence = {part: own[0] for part, own in alone.items()}
        order = influence_order(influence)
        counts = range(1, len(order) + 1)
        first = [[name for name, _ in order[:k]] for k in counts]
        curve = [original, *(score(taken) for taken in track(first, "hybrids", show, size=lambda _: 1))]
        k, limit = choose_count(curve, target)
        chosen = [name for name, _ in order[:k]]
        numbers = {name: len(own) for name, own in drawn.items()}
        agreement = agreement_of(alone)
        warnings = few(numbers) + warn(k, curve, agreement)
        pair.begin_result()
        pair.write_checkpoint(*hybrids.become(chosen))
        table, unlearned, rows_of = pair.evaluate(*hybrids.become(chosen), {n: set(own) for n, own in drawn.items()})
        calibration = {
            "method": METHOD, "component": component, "k": k, "of": len(order), "target": target,
            "validation": validation, "utility": measures.utility, "forgetting": measures.forgetting,
        }  # fmt: skip
        rows = three_columns(table, unlearned)
        result = CRUResult(pair.place.path, k, order, influence, curve, numbers, rows, warnings)
        kept = {
            **calibration, "limit": limit, "chosen": chosen, "rows": drawn, "order": order, "influence": influence,
            "curve": curve, "agreement": agreement, "warnings": warnings,
        }  # fmt: skip
        write_json(pair.place.path / "cru.json", kept)
        more = {"calibration": told(result, component), "validation": ", ".join(f"{n} {s}" for s, n in numbers.items())}
        made = describe(job.config, pair.attempts, more)
        names = UTILITIES[measures.utility], FORGETTINGS[measures.forgetting]
        verdict = pair.judge(table, rows_of)[1]
        page = render_cru(
            job.config.name, component, order, influence, curve, k, limit, names, numbers, rows, warnings, made, verdict
        )
        write_text(pair.place.report, page)
        pair.write(calibration, table, rows_of)
    tell(pair, result, component, names, verdict)
    return result


def draw(pair: Pair, share: float) -> dict[str, list[int]]:
    """Places of the validation rows of each set that counts. Raises ValueError for a set that none of is left."""
    sets, drawn = pair.sets(), {}
    if "retain" not in sets:
        raise ValueError(f"{pair.job.folder.path}: has no rows to retain, by which layers could be chosen")
    for name in ("forget", "retain", *(each for each in OTHERS if each in sets)):
        n = len(sets[name])
        count = max(1, round(share * n))
        if count >= n:
            raise ValueError(
                f"validation={share:g}: takes {count} of {n} {name} rows; needs some that are left for the result"
            )
        drawn[name] = sorted(random.Random(f"{pair.job.config.seed}/cru/{name}").sample(range(n), count))
    return drawn


def choose_measures(pair: Pair, utility: str | None, forgetting: str | None) -> tuple[str, str]:
    """Raises ValueError for an unknown one, or one that the run does not allow."""
    sets = pair.sets()
    lacking = [name for name in OTHERS if name not in sets]
    lacking += [name for name in ("retain", *OTHERS) if any(not item.perturbed_answers for item in sets.get(name, ()))]
    ratios = retrained_ratios(pair)
    if utility is not None:
        check_known("utility", utility, UTILITIES)
    if forgetting is not None:
        check_known("forgetting", forgetting, FORGETTINGS)
    if utility == "model_utility" and lacking:
        raise ValueError(
            "utility=model_utility: needs sets retain, real_authors and world_facts with perturbed answers "
            f"(evaluate.sets); the run has none of {', '.join(dict.fromkeys(lacking))}"
        )
    if forgetting == "forget_quality" and not ratios:
        raise ValueError(
            "forgetting=forget_quality: needs truth ratios of a retrained model: a run with truth_ratio among "
            "evaluate.metrics, and --retrain"
        )
    return (
        utility or ("probability" if lacking else "model_utility"),
        forgetting or ("forget_quality" if ratios else "forgotten"),
    )


def retrained_ratios(pair: Pair) -> list[float]:
    """Of the model that was retrained without the forget set, on it; none where there is none."""
    file = pair.job.folder.evaluation("retrained-forget.jsonl")
    rows = read_lines(file) if file.is_file() else []
    ratios = [row["truth_ratio"] for row in rows if "truth_ratio" in row]
    return [math.inf if ratio is None else ratio for ratio in ratios]  # JSON has no infinity


def agreement_of(alone: Mapping[str, Sequence[Score]]) -> float | None:
    """Spearman's rho of the components' rank sums by one half of the validation rows and by the other; None where it
    cannot be told."""
    if len(alone) < FEWEST or any(len(scores) < 3 for scores in alone.values()):
        return None
    halves = [dict(influence_order({part: scores[i] for part, scores in alone.items()})) for i in (1, 2)]
    if any(len({*half.values()}) == 1 for half in halves):
        return None
    return float(spearmanr(*([half[part] for part in alone] for half in halves)).statistic)


def warn(k: int, curve: Sequence[Score], agreement: float | None) -> list[str]:
    told = []
    if agreement is not None and agreement < AGREES:
        told.append(
            f"the order is noise for the most part: by one half of the validation rows and by the other it agrees with "
            f"a rank correlation of {agreement:.2f}; more rows (--validation) tell the parts apart better"
        )
    if k == len(curve) - 1:
        told.append("no hybrid that forgets enough is of more use than the unlearned model: it is left as it is")
    return told


def told(result: CRUResult, component: str) -> str:
    taken = f"{result.k} of {len(result.order)} parts by {component}"
    return f"CRU, {taken} from the unlearned model: {', '.join(result.chosen)}"


def tell(
    pair: Pair, result: CRUResult, component: str, names: tuple[str, str], verdict: Mapping[str, Any] | None
) -> None:
    console = pair.job.console
    table = Table("component", title=f"each {component} alone in the original model", title_justify="left")
    for column in ("utility", "forgetting", "rank sum", "taken"):
        table.add_column(column, justify="right")
    for name, ranks in result.order:
        utility, forgetting = result.influence[name]
        table.add_row(name, f"{utility:.4f}", f"{forgetting:.4f}", f"{ranks:g}", "yes" if name in result.chosen else "")
    for name, (utility, forgetting) in (("original", result.curve[0]), ("unlearned", result.curve[-1]),
                                        ("hybrid", result.curve[result.k])):  # fmt: skip
        table.add_row(f"[bold]{name}[/]", f"{utility:.4f}", f"{forgetting:.4f}")
    print_table(console, table)
    counts = " and ".join(f"{n} {name}" for name, n in result.counts.items())
    console.print(f"utility: {names[0]}; forgetting: {names[1]}; on {counts} rows", highlight=False)
    tell_table(console, result.rows, "on the rows that nothing was chosen by: before, unlearned and calibrated")
    console.print(f"[bold]k = {result.k}[/] of {len(result.order)}: {', '.join(result.chosen)}", highlight=False)
    for warning in result.warnings:
        console.print(f"note: {visible(warning)}", highlight=False, markup=False)
    tell_next(pair, verdict)
