"""The unlearning runs behind the figures, and the record that each leaves: one JSON file with its numbers.

A run whose record is there with the same settings is not computed again; one that was stopped goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pyunlearn.report.geffect import evenly
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.job import Job, first_model
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.settings import merge
from pyunlearn.training.trainer import NonFiniteLossError

from ...measure import commit, machine, versions

Record = dict[str, Any]
HEAT_LINES = 6  # probes whose token weights are drawn
SCATTER_STEPS = (12, 16, 20)
KEPT = ("total", "groups", "nll", "norm", "log10_inverse_confidence", "weights")


def sums(name: str, **options: Any) -> list[dict[str, Any]]:
    """A term as in the paper's equations: the sum over a sequence's tokens, the mean over sequences."""
    return [{"name": name, "reduction": "sequence_mean", "options": options}]


def misdirected(layer: str, c: float) -> dict[str, Any]:
    return {"forget": [{"name": "rmu", "options": {"layer": layer, "c": c}}], "retain": []}


def forgets(name: str, **options: Any) -> dict[str, Any]:
    return {"forget": sums(name, **options), "retain": []}


ALPHAS = (0.1, 1, 5)
BETAS = (0.1, 0.5, 1, 2)
TOKEN_BETAS = (0.1, 1, 4)
DEPTHS = ("shallow", "middle", "deep")
SCALES = (0, 1, 5)
PAIRS = ((0.1, 0.5), (5, 1.5))  # beta and alpha of WTNPO
RATES = (0.1, 0.3)  # times the base's learning rate

# name -> what the unlearning stage has: terms, and `rate` for another learning rate
RUNS: dict[str, dict[str, Any]] = {
    "ga": forgets("ga"),
    **{f"ga-rate-{rate}": {**forgets("ga"), "rate": rate} for rate in RATES},
    **{f"wga-{alpha}": forgets("wga", alpha=alpha) for alpha in ALPHAS},
    **{f"npo-{beta}": forgets("npo", beta=beta) for beta in BETAS},
    **{f"tnpo-{beta}": forgets("tnpo", beta=beta) for beta in TOKEN_BETAS},
    **{f"wtnpo-{beta}-{alpha}": forgets("wtnpo", beta=beta, alpha=alpha) for beta, alpha in PAIRS},
    "po": forgets("idk"),
    **{f"rmu-{layer}-{c}": misdirected(layer, c) for layer in DEPTHS for c in SCALES},
    "npo+gd": {**forgets("npo", beta=0.5), "retain": sums("gd")},
    "npo+kl": {**forgets("npo", beta=0.5), "retain": sums("kl")},
    "npo+rr": {**forgets("npo", beta=0.5), "retain": [{"name": "rr"}]},
    "rmu+rr": {**misdirected("middle", 5), "retain": [{"name": "rr"}]},
}
SCATTERED = tuple(f"npo-{beta}" for beta in BETAS)
HEATED = ("tnpo-4", "wtnpo-5-1.5")


def settings_of(base: RunConfig, name: str) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON gives it back."""
    chosen = RUNS[name]
    changes: dict[str, Any] = {key: value for key, value in chosen.items() if key != "rate"}
    changes["learning_rate"] = float(f"{base.unlearn.learning_rate * chosen.get('rate', 1.0):.4g}")
    given = merge(base.to_dict(), {"unlearn": changes, "geffect": {"pointwise": name in SCATTERED}})
    for section, key in (
        ("model", "name_or_path"),
        ("model", "gguf_file"),
        ("model", "tokenizer"),
        ("data", "refusals"),
    ):
        given[section][key] = given[section][key] and Path(given[section][key]).name  # not where this machine has it
    for source in filter(None, (given["data"]["forget"], given["data"]["retain"])):
        source["path"] = Path(source["path"]).name
    known = ("seed", "model", "data", "memorise", "unlearn", "geffect")
    return json.loads(json.dumps({key: given[key] for key in known}))


def filled(settings: Mapping[str, Any]) -> Record:
    """With today's defaults for what there was no setting for when they were written."""
    whole = RunConfig.model_validate(settings).to_dict()
    return {key: whole[key] for key in settings}


def measured(base: RunConfig, name: str, out: Path, work: Path, console: Console) -> Record:
    """The record of a run, from its file or computed now, in `work`."""
    path, settings = out / "runs" / f"{name}.json", settings_of(base, name)
    if path.is_file() and filled((record := json.loads(path.read_text()))["settings"]) == filled(settings):
        return record
    console.print(f"[bold]run[/] {name}")
    record = compute(base, name, settings, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(record))
    return record


def compute(base: RunConfig, name: str, settings: Mapping[str, Any], work: Path) -> Record:
    start = memorised(base, work)
    config = RunConfig.model_validate(
        {
            **base.to_dict(),
            "name": name.replace("+", "-"),
            "output": str(work / name),
            "model": {"name_or_path": str(start), "dtype": base.model.dtype},
            "memorise": None,
            "unlearn": settings["unlearn"],
            "geffect": settings["geffect"],
        }
    )
    folder, stopped = RunFolder(config.folder), None
    try:
        run(config, resume=folder.path.exists())
    except NonFiniteLossError as error:
        stopped = str(error)
    rows = [row for row in read_metrics(folder.metrics) if "geffect" in row]
    record: Record = {
        "name": name,
        "settings": settings,
        "stopped": stopped,
        "rows": [row_of(row) for row in rows],
        "seconds_a_probe": median([row["probe_seconds"] for row in rows]),
        "device": machine()["name"],
        "versions": versions(),
        "commit": commit(),
    }
    if name in SCATTERED:
        record["points"] = {row["step"]: points_of(row) for row in rows if row["step"] in SCATTER_STEPS}
    if name in HEATED:
        record["heat"] = heat([row for row in rows if "not_finite" not in row["geffect"]])
    return record


def memorised(base: RunConfig, work: Path) -> Path:
    """The model that all runs start from, in a folder of its own.

    Raises FileExistsError if `work` has that of another base.
    """
    given = base.to_dict()
    known = {key: given[key] for key in ("seed", "num_threads", "model", "data", "memorise")}
    config = RunConfig.model_validate({**known, "name": "start", "output": str(work / "start")})
    job = Job.start(config, None, "the same command")
    job.folder.open(config, resume=True)
    if not job.folder.memorised.is_dir():
        with job.interruptible():
            first_model(job)
    return job.folder.memorised


def row_of(row: Mapping[str, Any]) -> Record:
    """What is kept of a probe: totals, groups and what the paper draws beside them; the terms where there are two."""
    found = row["geffect"]
    if "not_finite" in found:
        return {"step": row["step"], "not_finite": found["not_finite"]}
    kept = {"step": row["step"], **{key: found[key] for key in KEPT}}
    if len(found["terms"]) > 1:
        kept["terms"] = {label: term["total"] for label, term in found["terms"].items()}
    return kept


def points_of(row: Mapping[str, Any]) -> Record:
    """By forget sample: PG-effects of GA on both metrics, and the weight."""
    found = row["geffect"]["pointwise"]
    (weights,) = found["weights"].values()
    return {"unlearn": found["unlearn"], "retain": found["retain"], "weight": weights}


def heat(rows: list[dict[str, Any]]) -> list[Record]:
    """The weight of every token of a few answers, along the run."""
    shown = [rows[i] for i in evenly(len(rows), HEAT_LINES)]
    drawn = []
    for i, text in enumerate(shown[0]["geffect"]["heat"]):
        weights = [next(iter(row["geffect"]["heat"][i]["weights"].values())) for row in shown]
        steps = [row["step"] for row in shown]
        drawn.append({"question": text["question"], "tokens": text["tokens"], "steps": steps, "weights": weights})
    return drawn


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def dump(value: Any) -> str:
    """JSON with a row a line and six digits: enough to draw, small enough to keep."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list | tuple) else value

    lines = []
    for key, each in short(value).items():
        told = json.dumps(each)
        if isinstance(each, list) and each and isinstance(each[0], dict):
            told = "[\n" + ",\n".join(json.dumps(row) for row in each) + "\n]"
        lines.append(f"{json.dumps(key)}: {told}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
