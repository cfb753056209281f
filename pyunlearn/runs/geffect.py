"""The job of `pyunlearn geffect`: the G-effect along a run, from the models it saved, in one process."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import write_json, write_text
from .._hints import path_hint
from .._terminal import print_table, shown, visible
from ..report.figures import as_file, to_svg
from ..report.geffect import figures, render_geffect, summary
from ..store import Store, belongs
from ..training.callbacks import read_metrics
from ..training.probe import Probe
from ..training.rows import make_probe
from ..training.selection import selected
from ..training.settings import GEffectConfig
from ..training.unlearn import check_model
from .config import RunConfig
from .fingerprint import data_fingerprints, model_fingerprints
from .folder import RunFolder
from .job import Job, loaded, starting_model
from .lock import A_COPY
from .overrides import load_config
from .provenance import Attempt, describe
from .sections import ModelConfig

FORMAT = "pyunlearn-geffect-1"


@dataclass(frozen=True)
class GEffectResult:
    """rows: {"step", "geffect": what `Probe.measure` gives}, by step. Files: geffect.json, .html and SVG figures."""

    rows: list[dict[str, Any]]
    folder: Path


def measure_run(
    path: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn geffect",
    **changes: Any,
) -> GEffectResult:
    """Probes every saved model of the run in `path`, and writes its folder geffect/. What is done is kept.

    changes: of the run's own `geffect` settings (`GEffectConfig`). overwrite: measure everything again. What was
    measured with other weights or other data is measured again in any case.

    Raises FileNotFoundError for no such folder or no saved model, ValueError for a folder that is not a run's, results
    of other settings, several processes, and what `g_effect` raises; InUse; Interrupted after Ctrl-C.
    """
    config = run_config(Path(path))
    if not config.has_retain:
        raise ValueError(
            f"RUN={str(path)!r}: has no rows to retain; the G-effect is of what is forgotten and what is retained"
        )
    probing = GEffectConfig.model_validate((config.geffect or GEffectConfig()).model_dump() | changes)
    changed: dict[str, Any] = {"output": str(path), "model": config.model.model_copy(update={"quantize": None})}
    if config.model.lora is not None:  # adapters are merged into what is loaded, all of which counts
        changed["unlearn"] = config.unlearn.model_copy(update={"train_only": None, "freeze": None})
    job = Job.start(config := config.model_copy(update=changed), console, command)
    if job.processes.count > 1:
        raise ValueError(f"geffect works in one process, got {job.processes.count}; start it without torchrun")
    attempt = Attempt(job.command)
    with job.interruptible(), job.locked(job.folder.lock, job.folder.path, A_COPY):
        models = saved_models(job)
        place = job.folder.geffect / "rows"
        if overwrite and belongs(place, FORMAT):
            shutil.rmtree(place, ignore_errors=True)
        try:
            store = Store(place, {"format": FORMAT, "settings": compared(probing)}, "RUN")
        except ValueError as error:
            raise ValueError(f"{error}, or --overwrite") from None
        reads = {**data_fingerprints(job.data), "reference": model_fingerprints(models[0])}
        identities = {step: {**model_fingerprints(source), **reads} for step, source in models.items()}
        probe: list[Probe] = []

        def measure(step: int) -> dict[str, Any]:
            if not probe:
                probe.append(prepare(job, probing))
            model, _ = loaded(job, models[step])
            if config.unlearn.gradient_checkpointing:
                enable_checkpointing(model)
            with selected(model, config.unlearn):
                return {"step": step, "geffect": probe[0].measure(model)}

        units = {step: f"step-{step:07d}" for step in models}
        measured = store.finish(
            units, measure, "G-effect", job.processes, identity=identities.__getitem__, progress=not job.console.quiet
        )
        rows = list(measured.values())
        made = attempt.record(job.data)
        write_json(result_file(job.folder), {"settings": compared(probing), "rows": rows, "made": made})
        write_figures(job, rows, describe(config, [made]))
    tell(job, rows)
    return GEffectResult(rows, job.folder.geffect)


def run_config(path: Path) -> RunConfig:
    if not path.is_dir():
        raise FileNotFoundError(f"RUN: no such folder: {path}{path_hint(path)}")
    file = RunFolder(path).config
    if not file.is_file():
        raise ValueError(f"RUN={str(path)!r}: is not a run folder (no config.yaml); make one with pyunlearn run")
    return load_config(file)


def saved_models(job: Job[RunConfig]) -> dict[int, ModelConfig]:
    """Optimiser step -> the model there: the one unlearning starts from, those kept on the way, and the last one.

    Raises FileNotFoundError where unlearning has saved none, or the memorised one is missing.
    """
    folder, config = job.folder, job.config
    config.unlearn.check_probed()
    paths = folder.kept_models()
    if folder.checkpoint.is_dir():
        steps = [row["step"] for row in read_metrics(folder.metrics) if row["stage"] == "unlearn"]
        paths.setdefault(max(steps), folder.checkpoint)
    if not paths:
        raise FileNotFoundError(
            f"RUN={str(folder.path)!r}: unlearning has saved no model yet; finish it (pyunlearn run ... --resume), or "
            "keep some on the way with --set unlearn.keep_steps=N"
        )
    if config.memorise is not None and not folder.memorised.is_dir():
        raise FileNotFoundError(
            f"RUN={str(folder.path)!r}: memorised/, the model that unlearning started from, is gone"
        )
    if config.memorise is not None:
        paths[0] = folder.memorised
    models = {
        step: ModelConfig(name_or_path=str(path), dtype=config.model.dtype) for step, path in sorted(paths.items())
    }
    return models if config.memorise is not None else {0: config.model, **models}


def result_file(folder: RunFolder) -> Path:
    return folder.geffect / "geffect.json"


def compared(settings: GEffectConfig) -> dict[str, Any]:
    """What decides the numbers."""
    return settings.model_dump(mode="json", exclude={"every", "batch_size"})


def prepare(job: Job[RunConfig], probing: GEffectConfig) -> Probe:
    """The probe, whose reference is the model that unlearning started from."""
    model, tokenizer = starting_model(job)
    check_model(job.config.unlearn, probing, model)
    return make_probe(job.stage(model, tokenizer), job.config.unlearn, probing, model, tokenizer, job.data)


def enable_checkpointing(model: Any) -> None:
    """As the training had it; it works in training mode only (`probe.as_found`)."""
    # transformers 5.x renamed it; the old name warns in newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()


def write_figures(job: Job[RunConfig], rows: list[dict[str, Any]], made: Mapping[str, str]) -> None:
    folder = job.folder.geffect
    write_text(folder / "geffect.html", render_geffect(job.config.name, rows, made))
    finite = [row for row in rows if "not_finite" not in row["geffect"]]
    for each in figures(finite):
        write_text(folder / f"{each['name']}.svg", as_file(to_svg(each["figure"], f"geffect-{each['name']}")))


def tell(job: Job[RunConfig], rows: list[dict[str, Any]]) -> None:
    table = Table("step", title="G-effect of the whole objective", title_justify="left")
    wanted = ("unlearning (wanted < 0)", "retaining (wanted >= 0)")
    for column in (*wanted, "forget NLL, nats a token", "retain NLL, nats a token"):
        table.add_column(column, justify="right")
    for row in rows:
        effect = row["geffect"]
        if "not_finite" in effect:
            table.add_row(str(row["step"]), shown(effect["not_finite"]))
        else:
            numbers = [effect[key][metric] for key in ("total", "nll") for metric in ("unlearn", "retain")]
            table.add_row(str(row["step"]), *(f"{number:.4g}" for number in numbers))
    print_table(job.console, table)
    for line in summary([row for row in rows if "not_finite" not in row["geffect"]]):
        job.console.print(shown(line), highlight=False, soft_wrap=True)
    totals = [row["geffect"]["total"] for row in rows if "not_finite" not in row["geffect"]]
    harms = bool(totals) and totals[-1]["retain"] < 0
    again = f"pyunlearn run {shlex.quote(str(job.folder.config))} --out FOLDER --set unlearn.keep_steps=N"
    lines = [
        f"report  {job.folder.geffect / 'geffect.html'}",
        f"numbers {result_file(job.folder)}",
        "",
        "try next",
        *([f"  {again}   # with models on the way: here are only the ends"] * (len(rows) <= 2)),
        *(["  pyunlearn recipes   # other methods: at the end a step of this one still costs retained rows"] * harms),
        f"  pyunlearn compare {shlex.quote(str(job.folder.path))} OTHER_RUN   # what another method forgot and kept",
    ]
    job.console.print("\n" + visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)
