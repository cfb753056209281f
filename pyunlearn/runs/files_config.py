"""What a job on files is told, in the place of a run's configuration: a model, and a data set or a suite's sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, field_validator

from .._hints import check_known
from ..data import QA, Prompt, load_muse, load_safe, load_whp, load_wmdp, make_prompt
from ..metrics import DEFAULT_METRICS, Suite, Variant, get_metric, get_suite
from ..training.settings import Section
from .config import Threads
from .evaluate_config import EndpointConfig, EvaluateConfig, as_classifiers
from .sections import ModelConfig, PromptConfig, SourceConfig, existing
from .tools import tools_of


class FilesConfig(Section):
    """A model and one data set, in the place of a run's configuration; what else a job reads has its default. data:
    None for a suite's tasks alone."""

    model: ModelConfig
    data: SourceConfig | None
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    seed: int = 0
    num_threads: Threads | None = None
    max_length: int | None = None
    prompt: PromptConfig = Field(default_factory=Prompt)
    memorise: None = None
    folder: Path = Path()

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(key, path) of all that the job reads and that is a file or a folder here."""
        data = None if self.data is None else self.data.path
        yield from existing({"--data": data, **self.model.named_paths()})

    @classmethod
    def of(
        cls,
        model: str,
        data: str,
        *,
        name: str | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        limit: int | None = None,
        columns: Mapping[str, str] | str | None = None,
        prompt: Any = None,
        rouge_samples: int = 20,
        batch_size: int = 16,
        variant: Any = "suffix",
        metrics: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        embedder: str | None = None,
        entailer: str | None = None,
        classifier: str | Mapping[str, str] | None = None,
        judge: Mapping[str, Any] | None = None,
    ) -> FilesConfig:
        """model, data: paths or Hub ids; name: of a Hub data set's configuration; columns: of `SourceConfig`, also
        as text, question=NAME,answer=NAME; prompt: of `make_prompt`; rouge_samples: 0 writes nothing; metrics: none are
        the default ones; options: of each, by its name; classifier: one for all, or by metric, also as text,
        clean=NAME,toxicity=NAME; judge: of `EndpointConfig`."""
        check_known("variant", variant, get_args(Variant))
        written = [name for name in (*metrics, *DEFAULT_METRICS) if "written" in get_metric(name).needs]
        if not rouge_samples and (asked := [name for name in metrics if name in written]):
            raise ValueError(
                f"--rouge-samples 0 writes nothing, and {asked[0]} is of written answers; needs 1 at least"
            )
        usual = [name for name in DEFAULT_METRICS if rouge_samples or name not in written]
        return cls(
            model=ModelConfig(name_or_path=model, gguf_file=gguf_file, tokenizer=tokenizer),
            data=SourceConfig.model_validate({"path": data, "name": name, "limit": limit, "columns": columns}),
            prompt=make_prompt(prompt),
            evaluate=EvaluateConfig(
                metrics=[*metrics] or usual,
                options={name: dict(own) for name, own in (options or {}).items()},
                embedder=embedder,
                entailer=entailer,
                classifier=as_classifiers(classifier),
                judge=None if judge is None else EndpointConfig.model_validate(judge),
                rouge_samples=rouge_samples or None,
                batch_size=batch_size,
                variant=variant,
            ),
        )


def load_none(source: str, limit: int | None = None) -> dict[str, list[QA]]:
    """Nothing: lm-eval has the data of its tasks, and no --data goes with it."""
    return {}


# Suites on other sets than TOFU's -> what reads these, of a folder or a Hub id, and how many rows of each.
BENCHMARKS: dict[str, Callable[[str, int | None], dict[str, list[QA]]]] = {
    "muse": load_muse,
    "wmdp": load_wmdp,
    "whp": load_whp,
    "safe": load_safe,
    "lm_eval": load_none,
}
TOOLS = ("embedder", "entailer", "classifier", "judge")


class SuiteConfig(FilesConfig):
    """A model and a folder or Hub data set with a suite's sets, for all its numbers; limit: samples of each task."""

    suite: str
    split: str = Field(default="forget10", description="of TOFU's forget set, whose file is data.name")
    text: str | None = Field(default=None, description="a text file, for perplexity")
    limit: int | None = Field(default=None, ge=1)
    tasks: list[str] = Field(default_factory=list, description="of lm-eval, in the place of the suite's own")
    task_folder: str | None = Field(default=None, description="with more of lm-eval's tasks")
    logs: dict[str, str] = Field(default_factory=dict, description="of reference models: retain, full")
    before: str | None = Field(
        default=None, description="the model before unlearning; None: where the model's run began"
    )
    reference: str | None = Field(default=None, description="a second model, for mia_reference")

    @field_validator("suite")
    @classmethod
    def exists(cls, suite: str) -> str:
        return get_suite(suite).name

    @property
    def lines(self) -> Suite:
        """The suite, with these tasks."""
        suite = get_suite(self.suite)
        return replace(suite, tasks=tuple(self.tasks)) if self.tasks else suite

    def paths(self) -> Iterator[tuple[str, Path]]:
        yield from super().paths()
        yield from existing(
            {
                "--before": self.before,
                "--reference": self.reference,
                "--text": self.text,
                **{f"--{name}-log": path for name, path in self.logs.items()},
            }
        )

    @classmethod
    def of_suite(
        cls,
        suite: str,
        model: str,
        data: str | None = None,
        *,
        split: str | None = None,
        text: str | None = None,
        tasks: Sequence[str] = (),
        task_folder: str | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        prompt: Any = None,
        logs: Mapping[str, str] | None = None,
        before: str | None = None,
        reference: str | None = None,
        **tools: Any,
    ) -> SuiteConfig:
        """model, data: paths or Hub ids, no data for tasks alone; split: of TOFU's suites, whose {split}_perturbed is
        the forget set; limit: of each set's rows, and of each task's samples; prompt: of `make_prompt`; tools:
        `TOOLS`, as `FilesConfig.of` takes them; before, reference: models, paths or Hub ids (`load_beside`).

        Raises ValueError for what no line of the suite uses.
        """
        lines = get_suite(suite)
        used = tools_of(measure.metric for measure in lines.measures)
        for name in tools:
            check_known("tool", name, TOOLS)
        for name, tool in {**tools, "before": before, "reference": reference}.items():
            if tool is not None and name not in used:
                usable = [f"--{tool}" for tool in (*TOOLS, "before", "reference") if tool in used]
                raise ValueError(f"--{name}: no line of suite {suite!r} uses it, but {', '.join(usable) or 'no tool'}")
        if split is not None and suite in BENCHMARKS:
            raise ValueError(f"--split={split}: goes with the suites on TOFU only, and {suite!r} is not one")
        if text is not None and "text" not in lines.known_sets:
            raise ValueError(f"--text={text}: no line of suite {suite!r} reads a text")
        if task_folder is not None and not (tasks or lines.tasks):
            raise ValueError(f"--task-folder={task_folder}: suite {suite!r} has no tasks; name some by --task")
        if not (lines.measures or tasks):
            raise ValueError(f"suite {suite!r} has no tasks of its own; name some by --task")
        on_tofu = suite not in BENCHMARKS
        if data is not None and not lines.known_sets:
            raise ValueError(f"--data={data}: suite {suite!r} reads none, lm-eval has that of its tasks")
        if data is None and (lines.sets or not (tasks or lines.tasks)):
            raise ValueError(f"--data: which? suite {suite!r} needs the folder or the Hub data set with its files")
        split = split or "forget10"
        judge = tools.pop("judge", None)
        return cls(
            suite=suite,
            split=split,
            text=text,
            tasks=list(tasks),
            task_folder=task_folder,
            model=ModelConfig(name_or_path=model, gguf_file=gguf_file, tokenizer=tokenizer),
            data=None
            if data is None
            else SourceConfig(path=data, name=f"{split}_perturbed" if on_tofu else None, limit=limit),
            limit=limit,
            prompt=make_prompt(prompt),
            evaluate=EvaluateConfig(
                batch_size=batch_size, judge=None if judge is None else EndpointConfig.model_validate(judge), **tools
            ),
            logs=dict(logs or {}),
            before=before,
            reference=reference,
        )
