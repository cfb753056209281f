"""The job of `pyunlearn geffect`: the G-effect along a run, from the models it saved, in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .._progress import track
from ..model.load import load_model, process_state
from ..report.geffect import figures, render_geffect
from ..training.callbacks import read_metrics
from ..training.probe import Probe
from ..training.unlearn import Context, interruptible, make_probe
from .config import GEffectConfig, ModelConfig, RunConfig, load_config
from .folder import RunFolder, differences
from .run import RunData, check_length, load_data, quiet_libraries, starting_model


@dataclass(frozen=True)
class GEffectResult:
    """rows: {"step", "g_effect": what `Probe.measure` gives}, by step. Files: geffect.json, .html and SVG figures."""

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

    changes: of the run's own `g_effect` settings (`GEffectConfig`). overwrite: measure everything again.

    Raises FileNotFoundError for no such folder or no saved model, ValueError for a folder that is not a run's, results
    of other settings, several processes, and what `g_effect` raises; Interrupted after Ctrl-C.
    """
    folder = RunFolder(path)
    config = run_config(folder)
    state = process_state()
    if state.num_processes > 1:
        raise ValueError(f"geffect works in one process, got {state.num_processes}; start it without torchrun")
    settings = (config.g_effect or GEffectConfig()).model_dump() | changes
    probing = GEffectConfig.model_validate(settings)
    models = saved_models(folder, config)
    rows = [] if overwrite else earlier_rows(folder, probing)
    console = console or Console(quiet=True)
    quiet_libraries()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    missing = [(step, source) for step, source in models.items() if step not in {row["step"] for row in rows}]
    with interruptible(command):
        if missing:
            probe, data = prepare(config, folder, probing, console)
            done = len(models) - len(missing)
            for step, source in track(missing, "G-effect", not console.quiet, lambda _: 1, done):
                model, _ = load_model(**source.model_dump(), texts=data.texts, seed=config.seed)
                if config.unlearn.gradient_checkpointing:
                    enable_checkpointing(model)
                rows.append({"step": step, "g_effect": probe.measure(model.to(state.device))})
                del model  # before the next one is loaded
                rows.sort(key=lambda row: row["step"])
                folder.write_json(result_file(folder), {"settings": compared(probing), "rows": rows})
        write_figures(folder, config, rows, command)
    tell(rows, folder, console)
    return GEffectResult(rows, folder.geffect)


def run_config(folder: RunFolder) -> RunConfig:
    if not folder.path.is_dir():
        raise FileNotFoundError(f"--run {folder.path}: no such folder")
    if not folder.config.is_file():
        raise ValueError(f"--run {folder.path}: is not a run folder (no config.yaml); make one with pyunlearn run")
    return load_config(folder.config)


def saved_models(folder: RunFolder, config: RunConfig) -> dict[int, ModelConfig]:
    """Optimiser step -> the model there: the one unlearning starts from, those kept on the way, and the last one.

    Raises FileNotFoundError where unlearning has saved none, or the memorised one is missing.
    """
    kept = {
        int(number): path
        for path in folder.kept.glob("step-*")
        if (number := path.name.removeprefix("step-")).isdigit()
    }
    if folder.checkpoint.is_dir():
        steps = [row["step"] for row in read_metrics(folder.metrics) if row["stage"] == "unlearn"]
        kept.setdefault(max(steps), folder.checkpoint)
    if not kept:
        raise FileNotFoundError(
            f"--run {folder.path}: unlearning has saved no model yet; finish it (pyunlearn run ... --resume), or keep "
            "some on the way with --set unlearn.keep_steps=N"
        )
    if config.memorise is not None and not folder.memorised.is_dir():
        raise FileNotFoundError(f"--run {folder.path}: memorised/, the model that unlearning started from, is gone")
    first = {0: folder.memorised} if config.memorise is not None else {}
    found = {step: as_model(path, config) for step, path in sorted((first | kept).items())}
    return found if first else {0: config.model, **found}


def as_model(path: Path, config: RunConfig) -> ModelConfig:
    return ModelConfig(name_or_path=str(path), dtype=config.model.dtype)


def result_file(folder: RunFolder) -> Path:
    return folder.geffect / "geffect.json"


def compared(settings: GEffectConfig) -> dict[str, Any]:
    """What decides the numbers."""
    return settings.model_dump(mode="json", exclude={"every", "batch_size"})


def earlier_rows(folder: RunFolder, settings: GEffectConfig) -> list[dict[str, Any]]:
    """What an earlier call has measured. Raises ValueError if it had other settings."""
    file = result_file(folder)
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    if changed := differences(stored["settings"], compared(settings)):
        raise ValueError(f"{file} holds results of other settings ({'; '.join(changed)}); choose --overwrite")
    return stored["rows"]


def prepare(config: RunConfig, folder: RunFolder, settings: GEffectConfig, console: Console) -> tuple[Probe, RunData]:
    """The probe, whose reference is the model that unlearning started from."""
    data = load_data(config.data, config.seed)
    model, tokenizer = starting_model(config, folder, data)
    model.to(process_state().device)
    context = Context(config, folder, console, check_length(config.data, model))
    return make_probe(context, settings, model, tokenizer, data.forget, data.retain, data.refusals), data


def enable_checkpointing(model: Any) -> None:
    """As the training had it; it works in training mode only (`probe.as_found`)."""
    # transformers 5.x renamed it; the old name warns in newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()


def write_figures(folder: RunFolder, config: RunConfig, rows: list[dict[str, Any]], command: str) -> None:
    folder.write_text(folder.geffect / "geffect.html", render_geffect(config.name, rows, command))
    finite = [row for row in rows if "not_finite" not in row["g_effect"]]
    for figure in figures(finite) if finite else []:
        folder.write_text(folder.geffect / f"{figure['name']}.svg", as_file(figure["svg"]))


def as_file(svg: str) -> str:
    """An <svg> element of a page as a file of its own, on white."""
    head, rest = svg.split(">", 1)
    return f'{head}>\n<rect width="100%" height="100%" fill="white"/>{rest}'


def tell(rows: list[dict[str, Any]], folder: RunFolder, console: Console) -> None:
    table = Table("step", title="G-effect of the whole objective", title_justify="left")
    for column in ("unlearning", "retaining", "forget NLL", "retain NLL"):
        table.add_column(column, justify="right")
    for row in rows:
        found = row["g_effect"]
        if "not_finite" in found:
            table.add_row(str(row["step"]), found["not_finite"])
        else:
            numbers = [found[key][metric] for key in ("total", "nll") for metric in ("unlearn", "retain")]
            table.add_row(str(row["step"]), *(f"{number:.4g}" for number in numbers))
    console.print(table)
    if len(rows) <= 2:
        console.print("only the ends: --set unlearn.keep_steps=N makes pyunlearn run keep models on the way")
    lines = [f"report  {folder.geffect / 'geffect.html'}", f"numbers {result_file(folder)}"]
    console.print("\n" + "\n".join(lines), highlight=False, soft_wrap=True, markup=False)
