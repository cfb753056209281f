"""The job of `pyunlearn reliability`: which metrics say the same of many models after an attack as before it."""

from __future__ import annotations

import math
import random
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import check_writable, read_json, write_json, write_text
from .._hints import check_known
from .._progress import track
from .._terminal import print_table, shown, visible
from ..calibration import Correlation, noised, pearson, prefixed, read_at
from ..calibration.reliability import PREFIX
from ..data import QA
from ..metrics import get_metric
from ..metrics.utility import mean
from ..model.combined import find_combined
from ..model.forward import layer_number, number_of
from ..report.calibrate import render_reliability
from ..store import Store, digest_json
from ..training.folder import TrainingFolder
from ..training.rate import rate_for
from ..training.rows import UnlearnData
from ..training.settings import MemoriseConfig
from ..training.unlearn import memorise
from .fingerprint import digest_pairs, model_fingerprints
from .fits import sizes
from .folder import RunFolder
from .job import Job, loaded
from .overrides import load_config
from .pair import READING, examine
from .provenance import Attempt, Record, describe
from .run import load_result, rate_of
from .sections import ModelConfig

ATTACKS = {
    "jailbreak": "a prefix to every question",
    "noising": "some tokens of every question replaced by random ones",
    "probing": "a middle layer read through the final norm and the head (logit lens)",
    "relearning": "one epoch of negative log-likelihood on a few forget rows; told of the others",
}
METRICS = ("probability", "memorization_accuracy", "extraction_strength", "rouge_l")
SETS = ("forget", "retain")
INSIDE = ("probing", "relearning")  # those that read or train what a model has inside
FEW = 10  # models, below which a correlation says little
Values = dict[str, dict[str, list[float | None]]]  # set -> metric -> of each row


@dataclass(frozen=True)
class Settings:
    """prefix: of the jailbreak. noise: share of tokens. layer: to probe, a number or shallow, middle, deep. relearn:
    forget rows that are learnt again. rate: of that; None is the unlearning's own, or that of all weights after an
    adapter. samples: rows of each set, drawn with the run's seed."""

    prefix: str = PREFIX
    noise: float = 0.05
    layer: int | str = "middle"
    relearn: int = 4
    rate: float | None = None
    samples: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.noise <= 1:
            raise ValueError(f"noise={self.noise:g}: needs a share of the tokens, above 0 and 1 at most")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"relearn_rate={self.rate:g}: needs a number above 0")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: needs 1 row of each set at least")


@dataclass(frozen=True)
class Point:
    """One model: which, and the means of set, metric and attack before and after it; NaN where there is none."""

    model: str
    before: dict[tuple[str, str, str], float]
    after: dict[tuple[str, str, str], float]


@dataclass(frozen=True)
class ReliabilityResult:
    """correlations: by attack, metric and set."""

    folder: Path
    points: list[Point]
    correlations: dict[tuple[str, str, str], Correlation]
    warnings: list[str]


class Subject:
    """One run, whose saved models are attacked."""

    def __init__(self, path: Path, metrics: Sequence[str], settings: Settings, console: Console | None, command: str):
        load_result(path)
        config = load_config(RunFolder(path).config)
        model = config.model.model_copy(update={"quantize": None})
        self.job = Job.start(config.model_copy(update={"output": str(path), "model": model}), console, command)
        self.path, self.settings = path, settings
        every = self.job.data.evaluated(config.evaluate.retain_limit)
        self.sets = {name: drawn(every[name], settings.samples, config.seed, name) for name in SETS if name in every}
        self.metrics = {name: self.metrics_of(metrics, items) for name, items in self.sets.items()}
        forget = self.sets["forget"]
        if not 0 < settings.relearn < len(forget):
            raise ValueError(
                f"relearn={settings.relearn}: {path} has {len(forget)} forget rows that count; needs 1 at least, and "
                "fewer than all: the others tell whether they came back"
            )
        seed = f"{config.seed}/relearn"
        self.relearnt = sorted(random.Random(seed).sample(range(len(forget)), settings.relearn))

    def metrics_of(self, metrics: Sequence[str], items: Sequence[QA]) -> list[str]:
        """Those that these rows allow."""
        there = all(item.perturbed_answers for item in items)
        return [name for name in metrics if there or "wrong" not in get_metric(name).needs]

    def check(self, attacks: Sequence[str]) -> None:
        """Raises ValueError for an attack that reads or trains the inside of one model, where the run's is two, and for
        a layer that it does not have."""
        inside = [attack for attack in INSIDE if attack in attacks]
        if inside and find_combined(str(self.job.folder.checkpoint)) is not None:
            raise ValueError(
                f"attack={inside[0]}: the model of {self.path} is two whose logits are combined, with no inside of its "
                f"own; leave the run out, or choose of {', '.join(name for name in ATTACKS if name not in INSIDE)}"
            )
        depth, _ = sizes(self.job.config.model)
        if "probing" in attacks and depth is not None:
            number_of(self.settings.layer, depth, str(self.path))

    def models(self) -> dict[str, ModelConfig]:
        """The run's last model and those kept on the way, each once, by what they are called here."""
        paths = {self.path.name: self.job.folder.checkpoint}
        paths |= {f"{self.path.name} step {step}": path for step, path in sorted(self.job.folder.kept_models().items())}
        kind: Any = {"dtype": self.job.config.model.dtype}
        own = {name: ModelConfig(name_or_path=str(path), **kind) for name, path in paths.items()}
        first = {digest_json(model_fingerprints(model)): name for name, model in reversed(own.items())}
        return {name: model for name, model in own.items() if name in first.values()}

    def identity(self, model: ModelConfig, attack: str) -> dict[str, Any]:
        """Of what an attack on a model gives: the weights, the rows, and what decides the attack."""
        config, settings = self.job.config, asdict(self.settings)
        own = {"jailbreak": ["prefix"], "noising": ["noise"], "probing": ["layer"], "relearning": ["relearn", "rate"]}
        return {
            "model": model_fingerprints(model),
            "rows": {name: digest_pairs(items) for name, items in self.sets.items()},
            "metrics": self.metrics,
            "reading": config.evaluate.model_dump(mode="json", include=READING),
            "dtype": config.model.dtype,
            "prompt": config.to_dict()["data"]["prompt"],
            "max_length": config.max_length,
            "seed": config.seed,
            "attack": attack,
            "settings": {key: settings[key] for key in own.get(attack, [])},
            "relearnt": self.rate() if attack == "relearning" else None,
        }

    def rate(self) -> float | None:
        """What rows are learnt again at; None is by the model's size (`training.rate`)."""
        if self.settings.rate is not None or self.job.config.model.lora is not None:
            return self.settings.rate
        return rate_of(self.job.config, load_unlearning(self.job.folder)) or None

    def values(self, model: Any, tokenizer: Any, sets: Mapping[str, Sequence[QA]]) -> Values:
        found = examine(self.job, model, tokenizer, sets, self.metrics)
        return {
            name: {metric: [record.get(metric) for record in own.records] for metric in self.metrics[name]}
            for name, own in found.items()
        }

    def attacked(self, attack: str, model: Any, tokenizer: Any, work: Path) -> Values:
        """What the model says under an attack, or, for "none", without any. Relearning changes the model for good."""
        settings, sets, seed = self.settings, self.sets, self.job.config.seed
        if attack == "jailbreak":
            sets = {name: prefixed(items, settings.prefix) for name, items in sets.items()}
        elif attack == "noising":
            sets = {name: noised(items, tokenizer, settings.noise, seed) for name, items in sets.items()}
        elif attack == "probing":
            with read_at(model, layer_number(model, settings.layer)):
                return self.values(model, tokenizer, sets)
        elif attack == "relearning":
            self.relearn(model, tokenizer, work)
        return self.values(model, tokenizer, sets)

    def relearn(self, model: Any, tokenizer: Any, work: Path) -> None:
        rows = [self.sets["forget"][i] for i in self.relearnt]
        config, stage = self.job.config, self.job.stage(model, tokenizer)
        training = MemoriseConfig(
            epochs=1,
            learning_rate=self.rate() or rate_for(model),
            batch_size=config.unlearn.batch_size,
            scheduler="constant",
        )
        shutil.rmtree(work, ignore_errors=True)  # of a kill: it is short, and begins anew
        quiet = replace(stage, folder=TrainingFolder(work), console=Console(quiet=True))
        try:
            memorise(quiet, training, model, tokenizer, UnlearnData(rows, [], []), "relearn")
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def means(self, values: Values, without: Sequence[int] = ()) -> dict[tuple[str, str], float]:
        """By set and metric; without: places of forget rows that are left out."""
        out = {"forget": {*without}}
        kept = {
            (name, metric): [v for i, v in enumerate(own) if v is not None and i not in out.get(name, ())]
            for name, of in values.items()
            for metric, own in of.items()
        }
        return {key: mean(own) for key, own in kept.items()}


def measure_reliability(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "runs/reliability",
    attacks: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
    settings: Settings | None = None,
    console: Console | None = None,
    command: str = "pyunlearn reliability",
) -> ReliabilityResult:
    """Attacks every saved model of finished runs, and correlates each metric's means before and after, of the forget
    and the retain set each; writes `out`. What is measured is kept there, by the models' weights.

    attacks: of ATTACKS; none are all.

    Raises ValueError for fewer than 3 models, an unknown attack or metric, one that needs a tool, bad settings, an
    attack on the inside of two models that are combined, and `out` in the place of a run; what `load_result` raises;
    InUse; Interrupted after Ctrl-C.
    """
    settings = settings or Settings()
    chosen = [*attacks] or [*ATTACKS]
    for attack in chosen:
        check_known("attack", attack, ATTACKS)
    for name in metrics:
        if tools := get_metric(name).required_tools:
            raise ValueError(f"metric={name}: needs {', '.join(tools)}; choose metrics that a model alone has")
    out = Path(out)
    if RunFolder(out).marked:
        raise ValueError(f"--out {out}: is a run folder; choose a folder of its own")
    paths = {path.resolve(): path for path in map(Path, runs)}
    subjects = [Subject(path, metrics, settings, console, command) for path in paths.values()]
    for subject in subjects:
        subject.check(chosen)
    models = {name: (subject, model) for subject in subjects for name, model in own_names(subject, subjects).items()}
    if len(models) < 3:
        raise ValueError(
            f"RUN: has {len(models)} saved models, a correlation needs 3, and says little of fewer than {FEW}; "
            "name more runs, or keep models on the way by unlearn.keep_steps"
        )
    job, attempt = subjects[0].job, Attempt(command)
    check_writable(out / ".lock", f"--out {out}")
    with job.interruptible(), job.locked(out / ".lock", out):
        store = Store(out / "points")
        points = [
            attack_model(name, subject, model, chosen, store, out / "work")
            for name, (subject, model) in track_models(models, not job.console.quiet)
        ]
        keys = list(dict.fromkeys(key for point in points for key in point.after))
        correlations = {
            key: pearson([p.before.get(key, math.nan) for p in points], [p.after.get(key, math.nan) for p in points])
            for key in keys
        }
        warnings = warn(points, subjects)
        rows = [{"attack": a, "metric": m, "set": s, **asdict(found)} for (a, m, s), found in correlations.items()]
        made = attempt.record(job.data)
        numbers = [
            {"model": p.model, "attack": a, "metric": m, "set": s, "before": finite(p.before[a, m, s]),
             "after": finite(value)}
            for p in points for (a, m, s), value in p.after.items()
        ]  # fmt: skip
        write_json(
            out / "reliability.json",
            {"settings": asdict(settings), "correlations": rows, "points": numbers, "warnings": warnings, "made": made},
        )
        page = render_reliability(
            rows, numbers, {name: ATTACKS[name] for name in chosen}, len(points), warnings, told(job, made, settings)
        )
        write_text(out / "reliability.html", page)
    result = ReliabilityResult(out, points, correlations, warnings)
    tell(job.console, result, chosen)
    return result


def track_models(models: Mapping[str, Any], show: bool) -> Any:
    return track([*models.items()], "models attacked", show, size=lambda _: 1)


def attack_model(
    name: str, subject: Subject, source: ModelConfig, chosen: Sequence[str], store: Store, work: Path
) -> Point:
    """Every attack on one model, which is loaded if any is missing; relearning comes last, it changes the weights."""
    identities = {attack: subject.identity(source, attack) for attack in ("none", *chosen)}
    units = {attack: f"{attack}-{digest_json(own)[:24]}" for attack, own in identities.items()}
    found: dict[str, Any] = {attack: store.get(units[attack], identities[attack]) for attack in units}
    missing = [attack for attack, own in found.items() if own is None]
    if missing:
        model, tokenizer = loaded(subject.job, source)
        for attack in sorted(missing, key=lambda each: each == "relearning"):
            values = subject.attacked(attack, model, tokenizer, work)
            found[attack] = store.put(units[attack], values, identities[attack])
    before: dict[tuple[str, str, str], float] = {}
    after: dict[tuple[str, str, str], float] = {}
    for attack in chosen:
        without = subject.relearnt if attack == "relearning" else ()
        for moment, measured in ((before, found["none"]), (after, found[attack])):
            means = subject.means(measured, without)
            moment |= {(attack, metric, which): value for (which, metric), value in means.items()}
    return Point(name, before, after)


def own_names(subject: Subject, subjects: Sequence[Subject]) -> dict[str, ModelConfig]:
    """Its models; by the run's whole path where another run's folder has the same name."""
    same = [other for other in subjects if other.path.name == subject.path.name]
    prefix = f"{subject.path.parent}/" if len(same) > 1 else ""
    return {f"{prefix}{name}": model for name, model in subject.models().items()}


def drawn(items: Sequence[QA], most: int, seed: int, name: str) -> list[QA]:
    """That many of them, in their order. Raises ValueError for none."""
    if most < 1:
        raise ValueError(f"samples={most}: needs 1 row of each set at least")
    if most >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(f"{seed}/reliability/{name}").sample(range(len(items)), most))]


def load_unlearning(folder: RunFolder) -> dict[str, Any]:
    return dict(read_json(folder.unlearning, "--resume of the run makes it again"))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def warn(points: Sequence[Point], subjects: Sequence[Subject]) -> list[str]:
    """What may mislead, plainly."""
    warnings = []
    if len(points) < FEW:
        warnings.append(f"{len(points)} models: a correlation of so few says little, see its interval")
    kept = sum(len(subject.models()) > 1 for subject in subjects)
    if kept:
        warnings.append(
            "models of one run are not independent of each other: intervals take every model for one of its own"
        )
    rows = {digest_json({name: digest_pairs(items) for name, items in subject.sets.items()}) for subject in subjects}
    if len(rows) > 1:
        warnings.append("the runs do not have the same rows: what differs between them is not the models alone")
    return warnings


def told(job: Job[Any], made: Record, settings: Settings) -> dict[str, str]:
    rate = "the unlearning's own" if settings.rate is None else f"{settings.rate:g}"
    own = {
        "prefix": settings.prefix,
        "noise": f"{settings.noise:.0%} of a question's tokens",
        "layer": str(settings.layer),
        "relearnt": f"{settings.relearn} forget rows, learning rate {rate}",
        "samples": f"{settings.samples} rows of each set at most",
    }
    return describe(job.config, [made], own)


def tell(console: Console, result: ReliabilityResult, chosen: Sequence[str]) -> None:
    table = Table("metric", "set", title="Pearson's r, before and after an attack", title_justify="left")
    for attack in chosen:
        table.add_column(attack, justify="right")
    metrics = dict.fromkeys((metric, which) for _, metric, which in result.correlations)
    for metric, which in metrics:
        cells = [text_of(result.correlations[attack, metric, which]) for attack in chosen]
        table.add_row(metric, shown(which), *cells)
    print_table(console, table)
    console.print(f"{len(result.points)} models; [] the 95 % interval (Fisher's z)", highlight=False, markup=False)
    for warning in result.warnings:
        console.print(f"note: {visible(warning)}", highlight=False, markup=False)
    why = {found.reason: None for found in result.correlations.values() if found.reason}
    for reason in why:
        console.print(f"–: {visible(reason)}", highlight=False, markup=False)
    name = shlex.quote(str(result.folder))
    lines = [
        f"report  {result.folder / 'reliability.html'}",
        f"numbers {result.folder / 'reliability.json'}",
        "",
        "try next",
        f"  pyunlearn reliability MORE_RUNS... --out {name}   # what is measured is kept",
        "  pyunlearn calibrate uwc RUN   # compare runs where each keeps the same",
    ]
    console.print("\n" + visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)


def text_of(found: Correlation) -> str:
    if found.r is None:
        return "–"
    return f"{found.r:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")
