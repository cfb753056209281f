"""A model that is trained further on the forget set, and what a run makes of it: arithmetic on weights or logits."""

from __future__ import annotations

from typing import Any

from .._files import write_json
from .._terminal import shown
from ..model.arithmetic import negate, negate_adapter
from ..model.combined import make_combined
from ..model.lora import add_adapter, count_parameters, merge, read_adapter
from ..training.callbacks import read_metrics
from ..training.method import TermConfig, UnlearnConfig
from ..training.settings import ReinforceConfig
from ..training.stage import Stage
from ..training.unlearn import Unlearned, reinforce
from .config import RunConfig
from .job import Job, adapters_base, loaded, save, starting_model
from .sections import ModelConfig

STAGE = "reinforce"


def make_reinforced(job: Job[RunConfig], stage: Stage) -> None:
    """Trains the reinforced model into the run's folder, an adapter where the run has one, unless it is there."""
    if job.folder.reinforced.is_dir():
        return
    settings, lora = reinforcing(job), job.config.model.lora
    model, tokenizer = starting_model(job)
    if lora is not None:
        model = add_adapter(model, **lora.adapter(), seed=stage.seed, base=adapters_base(job))
    job.console.print("[bold]reinforce[/] a copy on the forget set, to see what that changes")
    reinforce(stage, settings, model, tokenizer, job.data)
    save(job, STAGE, model, tokenizer)


def reinforced_model(job: Job[RunConfig]) -> Any:
    """The reinforced model as a plain one, on this process's device."""
    if job.config.model.lora is None:
        return loaded(job, ModelConfig(name_or_path=str(job.folder.reinforced), dtype=job.config.model.dtype))[0]
    base, _ = starting_model(job)
    return merge(read_adapter(base, job.folder.reinforced)).to(job.processes.device).eval()


def arithmetic(job: Job[RunConfig], stage: Stage, model: Any, tokenizer: Any) -> Any:
    """The unlearned model, saved, where no objective is trained: `unlearn.reinforce.into` is weights or logits."""
    settings, lora = reinforcing(job), job.config.model.lora
    job.console.print(f"[bold]unlearn[/] {shown(told(job.config.unlearn))}")
    if settings.into == "logits":
        result, changed = make_combined(model, reinforced_model(job), settings.strength), 0.0
    elif lora is not None:
        result = read_adapter(model, job.folder.reinforced)
        base = adapters_base(job)  # peft has put the model's own name there
        result.peft_config["default"].base_model_name_or_path = base
        changed = negate_adapter(result, settings.strength)
    else:
        result, changed = model, negate(model, job.folder.reinforced, settings.strength)
    trained, parameters = count_parameters(result)
    reinforced = reinforcement(job)
    unlearned = Unlearned(
        steps=0, packing=None, compiling=None, learning_rate=reinforced["learning_rate"],
        mean_absolute_change=changed, trained=trained, parameters=parameters, limits=None, refreshed_at=[], samples=[],
    )  # fmt: skip
    if job.processes.first:
        write_json(job.folder.unlearning, {**unlearned.as_dict(), "reinforced": reinforced})
    if lora is not None and settings.into == "weights" and lora.save == "merged":
        result = merge(result)
    save(job, "unlearn", result, tokenizer)
    adapted = lora is not None and settings.into == "weights" and lora.save == "adapter"
    return merge(result) if adapted and job.config.model.quantize is None else result


def reinforcing(job: Job[RunConfig]) -> ReinforceConfig:
    settings = job.config.unlearn.reinforce
    assert settings is not None  # asked for by who knows
    return settings


def reinforcement(job: Job[RunConfig]) -> dict[str, Any]:
    """steps and learning_rate (at its highest) of the reinforced model's training."""
    rows = [row for row in read_metrics(job.folder.metrics) if row["stage"] == STAGE]
    return {"steps": len(rows), "learning_rate": max((row["learning_rate"] for row in rows), default=0.0)}


def told_term(term: TermConfig) -> str:
    """`1·ga (temperature 2, keep 0.8)`: with what is set of it beside its coefficient."""
    keys = ("preset", "reduction", "temperature", "keep", "kept")
    own = {key: getattr(term, key) for key in keys} | dict(term.options)
    given = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in own.items()
        if value is not None
    ]
    return f"{term.coefficient:g}·{term.name}" + (f" ({', '.join(given)})" if given else "")


def told(settings: UnlearnConfig) -> str:
    """What makes a model forget, in one line: its objectives, or the arithmetic in their place."""
    made = settings.reinforce
    if made is None or settings.trains:
        terms = " + ".join(told_term(term) for term in (*settings.forget, *settings.retain))
        return terms if settings.dual is None else f"{terms}, the retain coefficient a dual variable"
    if made.into == "weights":
        return f"θ - {made.strength:g} (θ_reinforced - θ)"
    return f"v_base - {made.strength:g} ReLU(v_reinforced - v_base) at inference"
