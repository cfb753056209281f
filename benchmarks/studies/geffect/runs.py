"""The unlearning runs behind the figures, and the record that each leaves: its numbers, a line of runs.json.

A record is a unit of a `Store`, its identity the settings of the run. A run whose record is there with the same
settings is not computed again; one that was stopped goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pyunlearn.report.geffect import evenly
from pyunlearn.runs.config import RunConfig, as_meant
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.job import Job, first_model
from pyunlearn.runs.run import run
from pyunlearn.store import Store, plain
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.settings import merge
from pyunlearn.training.trainer import NonFiniteLossError

from ...measure import commit, machine, versions
from ...results import units

Record = dict[str, Any]
HEAT_LINES = 6  # probes whose token weights are drawn
SCATTER_STEPS = (12, 16, 20)
DRAWN = ("total", "groups", "nll", "norm", "log10_inverse_confidence", "weights")


def sums(name: str, **options: Any) -> list[dict[str, Any]]:
    """A term as in the paper's equations: the sum over a sequence's tokens, the mean over sequences."""
    return [{"name": name, "reduction": "sequence_mean", "options": options}]


def means(name: str, **options: Any) -> list[dict[str, Any]]:
    """RMU and RR as in the paper's equations: the mean over a sequence's tokens, then over sequences."""
    return [{"name": name, "reduction": "sequence_token_mean", "options": options}]


def misdirected(layer: str, c: float) -> dict[str, Any]:
    return {"forget": means("rmu", layer=layer, c=c), "retain": []}


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
    "npo+rr": {**forgets("npo", beta=0.5), "retain": means("rr")},
    "rmu+rr": {**misdirected("middle", 5), "retain": means("rr")},
}
SCATTERED = tuple(f"npo-{beta}" for beta in BETAS)
HEATED = ("tnpo-4", "wtnpo-5-1.5")


def settings_of(base: RunConfig, name: str) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON gives it back."""
    chosen = RUNS[name]
    changes: dict[str, Any] = {key: value for key, value in chosen.items() if key != "rate"}
    changes["learning_rate"] = float(f"{base.unlearn.learning_rate * chosen.get('rate', 1.0):.4g}")
    whole = merge(base.to_dict(), {"unlearn": changes, "geffect": {"pointwise": name in SCATTERED}})
    for section, key in (
        ("model", "name_or_path"),
        ("model", "gguf_file"),
        ("model", "tokenizer"),
        ("data", "refusals"),
    ):
        whole[section][key] = whole[section][key] and Path(whole[section][key]).name  # not where this machine has it
    for source in filter(None, (whole["data"]["forget"], whole["data"]["retain"])):
        source["path"] = Path(source["path"]).name
    return plain({key: whole[key] for key in ("seed", "model", "data", "memorise", "unlearn", "geffect")})


def fill(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With what there was no setting for when they were written."""
    whole = RunConfig.model_validate(as_meant(settings)).to_dict()
    return {key: whole[key] for key in settings}


def measure(base: RunConfig, name: str, out: Path, work: Path, console: Console) -> Record:
    """The record of a run, from `out` or computed now, in `work`."""
    file, settings = out / "runs.json", settings_of(base, name)
    unit = units(file).get(name)
    if unit is None or fill(unit["identity"]) != fill(settings):
        console.print(f"[bold]run[/] {name}")
        Store(file).put(name, rounded(compute(base, name, settings, work)), settings)
        unit = units(file)[name]
    return {"name": name, "settings": unit["identity"], **unit["value"]}


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
        "stopped": stopped,
        "rows": [row_of(row) for row in rows],
        "seconds_a_probe": median([row["probe_seconds"] for row in rows]),
        "device": machine()["name"],
        "versions": versions(),
        "commit": commit(),
    }
    if name in SCATTERED:
        record["points"] = {str(row["step"]): points_of(row) for row in rows if row["step"] in SCATTER_STEPS}
    if name in HEATED:
        record["heat"] = heat([row for row in rows if "not_finite" not in row["geffect"]])
    return record


def memorised(base: RunConfig, work: Path) -> Path:
    """The model that all runs start from, in a folder of its own.

    Raises FileExistsError if `work` has that of another base.
    """
    whole = base.to_dict()
    own = {key: whole[key] for key in ("seed", "num_threads", "model", "data", "memorise")}
    config = RunConfig.model_validate({**own, "name": "start", "output": str(work / "start")})
    job = Job.start(config, None, "the same command")
    job.folder.open(config, resume=job.folder.marked)
    if not job.folder.memorised.is_dir():
        with job.interruptible():
            first_model(job)
    return job.folder.memorised


def row_of(row: Mapping[str, Any]) -> Record:
    """What is kept of a probe: totals, groups and what the paper draws beside them; the terms where there are two."""
    effect = row["geffect"]
    if "not_finite" in effect:
        return {"step": row["step"], "not_finite": effect["not_finite"]}
    terms = {label: term["total"] for label, term in effect["terms"].items()}
    several = {"terms": terms} if len(terms) > 1 else {}
    return {"step": row["step"], **{key: effect[key] for key in DRAWN}, **several}


def points_of(row: Mapping[str, Any]) -> Record:
    """By forget sample: PG-effects of GA on both metrics, and the weight."""
    effects = row["geffect"]["pointwise"]
    (weights,) = effects["weights"].values()
    return {"unlearn": effects["unlearn"], "retain": effects["retain"], "weight": weights}


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


def rounded(value: Any) -> Any:
    """To six digits: enough to draw, small enough to keep."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
