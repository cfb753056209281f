"""What every command starts from, and the model that its work begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError, safe_open

from .._files import OTHER_FOLDER, SEAL, check_seal, check_writable
from .._terminal import visible
from ..data import make_format
from ..distributed import Processes
from ..metrics import Endpoint
from ..model.causal_lm import CausalLM
from ..model.combined import parts_of
from ..model.load import load_model
from ..model.lora import check_peft, tried
from ..training.arguments import check_library, check_trackers, check_values
from ..training.folder import write_model
from ..training.generic import read_anchors
from ..training.rows import rows_trained
from ..training.selection import trained_names
from ..training.stage import Interrupted, Stage, training_arguments
from ..training.unlearn import check_model, memorise, to_memorise
from .config import RunConfig
from .data import RunData, load_data
from .files_config import FilesConfig
from .fingerprint import fingerprints
from .folder import MARK, WAYS_OUT, RunFolder
from .lock import held
from .sections import ModelConfig

UNREADABLE = (SafetensorError, StrictDataclassError, KeyError, JSONDecodeError)  # of damaged files
C = TypeVar("C", bound="RunConfig | FilesConfig")


@dataclass(frozen=True)
class Job(Generic[C]):
    """One command at work. command: the words that started it, without those that throw earlier work away. endpoints:
    by what they are for, made once, so that a budget is the job's. references: of `Stage`."""

    config: C
    folder: RunFolder
    data: RunData
    console: Console
    processes: Processes
    command: str
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    references: Path | None = None

    @classmethod
    def start(cls, config: C, console: Console | None, command: str, references: Path | None = None) -> Job[C]:
        """Joins the processes of torchrun and loads the data; writes nothing. console: None is silent.

        Raises what `load_data` raises.
        """
        quiet_libraries()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        processes = Processes.start()
        if console is None or not processes.first:
            console = Console(quiet=True)
        data = load_data(config)
        for path, found in data.recognised.items():
            console.print(visible(f"{path}: {found}"), highlight=False, soft_wrap=True, markup=False)
        return cls(config, RunFolder(config.folder), data, console, processes, command, references=references)

    @contextmanager
    def interruptible(self, again: str = "") -> Iterator[None]:
        """Ctrl-C inside is told with the command that goes on from there: `command`, and `again` after it."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            what = str(interrupt) or "stopped; everything finished so far is kept"
            signum = getattr(interrupt, "exit_code", 130) - 128
            raise Interrupted(f"{what}\nresume with: {self.command}{again}", signum) from None

    @contextmanager
    def opened(self, *, resume: bool = False, overwrite: bool = False, ways: str = WAYS_OUT) -> Iterator[None]:
        """The run folder, this job's alone and opened for the block (see `RunFolder.open`); one of files has none.

        What was to be overwritten is back if the block raises before `first_model` has loaded a model. A folder that is
        made for the job and in which an error comes before anything is computed goes again.

        Raises InUse if another job works there, OSError that names --out where nothing can be written.
        """
        if not isinstance(self.config, RunConfig):
            yield
            return
        with self.processes.first_first():
            if self.processes.first:
                self.folder.check_place()
        new = self.processes.first and not self.folder.path.exists()
        option, remedy = ("--out ", OTHER_FOLDER) if ways == WAYS_OUT else ("", ways)
        try:
            with self.processes.first_first():
                if self.processes.first:
                    check_writable(self.folder.lock, f"{option}{self.folder.path}", remedy)
            with self.locked(self.folder.lock, self.folder.path):
                try:
                    with self.processes.first_first():
                        if self.processes.first:
                            reads = fingerprints(self.config, self.data)
                            self.folder.open(self.config, resume=resume, overwrite=overwrite, reads=reads, ways=ways)
                    yield
                except BaseException as error:
                    if self.processes.first:
                        self.folder.recover()
                    if new and isinstance(error, Exception):  # after Ctrl-C there may be a --resume
                        self.folder.discard()
                    raise
        finally:
            if new:
                with suppress(OSError):  # it is not empty
                    self.folder.path.rmdir()

    @contextmanager
    def locked(self, lock: Path, what: Path, remedy: str = OTHER_FOLDER) -> Iterator[None]:
        """`held` by the first process for all of them."""
        with ExitStack() as stack:
            with self.processes.first_first():
                if self.processes.first:
                    stack.enter_context(held(lock, what, remedy))
            yield

    def stage(self, model: Any, tokenizer: Any) -> Stage:
        """What a training of this job gets. Raises ValueError if data.max_length is beyond the model's context, and as
        `PromptFormat`."""
        context, asked = CausalLM.of(model).context_length, self.config.max_length
        if context is not None and asked is not None and asked > context:
            raise ValueError(f"data.max_length={asked}: the model's context is {context} tokens")
        return Stage(
            self.folder,
            self.config.seed,
            asked or context,
            self.console,
            self.processes,
            self.config.evaluate.batch_size,
            make_format(tokenizer, self.config.prompt),
            self.references,
        )


def starting_model(job: Job) -> tuple[Any, Any]:
    """Model, on this process's device, and tokenizer: as memorised by an earlier attempt, or as configured."""
    if job.config.memorise is not None and job.folder.memorised.is_dir():
        return loaded(job, ModelConfig(name_or_path=str(job.folder.memorised), dtype=job.config.model.dtype))
    return loaded(job, job.config.model)


def loaded(job: Job, config: ModelConfig) -> tuple[Any, Any]:
    """Raises what `load_model` raises, ValueError for a model of a run that is not what was written, and as
    `check_no_run`."""
    model: Any
    folder = Path(config.name_or_path)
    if config.gguf_file is None:
        check_no_run(folder)
    check_as_written(folder)
    try:
        model, tokenizer = load_model(**config.loading(), texts=job.data.texts, seed=job.config.seed)
    except Exception as error:
        if isinstance(error, UNREADABLE) or type(error) is Exception:  # tokenizers' own
            raise unreadable(config, error) from error
        raise
    return model if config.quantize is not None else model.to(job.processes.device), tokenizer


def check_as_written(folder: Path) -> None:
    """Raises ValueError for a model of a run that is not what was written; of others nothing is known."""
    if (folder / SEAL).is_file():
        check_seal(folder, f"make the model again, or delete {folder / SEAL} if it was changed on purpose")


def check_no_run(folder: Path) -> None:
    """Raises ValueError for a run's own folder, FileNotFoundError for a model that a run has not got to yet."""
    run = RunFolder(folder if (folder / MARK).is_file() else folder.parent)
    if not run.marked or folder not in (run.path, run.checkpoint):
        return
    if not run.checkpoint.is_dir():
        raise FileNotFoundError(
            f"model.name_or_path={str(folder)!r}: {run.path} is a run that stopped {run.stopped}, it has no checkpoint "
            "yet; its own command with --resume goes on"
        )
    if folder == run.path:
        raise ValueError(f"model.name_or_path={str(folder)!r}: is a run: its model is {run.checkpoint}")


def unreadable(config: ModelConfig, error: Exception) -> ValueError:
    """The one error for a model whose files are not what their names say: which file, where it can be told."""
    name = config.name_or_path
    if config.embedded:
        return ValueError(f"model.options={config.options}: {' '.join(str(error).split())}")
    for file in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except SafetensorError as broken:
            return ValueError(f"{file}: is damaged or no safetensors file ({broken}); fetch or make it again")
    files = "config.json" if isinstance(error, StrictDataclassError) else "model or tokenizer files"
    told = " ".join(str(error).split())
    return ValueError(f"model.name_or_path={name!r}: its {files} cannot be read ({told}); fetch or make it again")


def first_model(job: Job) -> tuple[Any, Any, Stage]:
    """Model and tokenizer before unlearning, memorised (by an earlier attempt or now) if the configuration says so.

    Raises ValueError, before anything is memorised, for settings that the model does not have; before that, ImportError
    for a package that is not installed.
    """
    if isinstance(job.config, RunConfig):
        named = {"memorise": job.config.memorise, "unlearn": job.config.unlearn}
        for name, settings in {**named, "unlearn.reinforce": job.config.unlearn.reinforce}.items():
            if settings is not None:
                check_trackers(settings.report_to, f"{name}.report_to")
                check_library(settings.optim, f"{name}.optim")
                check_values(settings, f"{name}.arguments")
        if job.config.model.lora is not None:
            check_peft("model.lora")
    model, tokenizer = starting_model(job)
    stage = job.stage(model, tokenizer)
    if isinstance(job.config, RunConfig):
        check_trainings(job, stage, model)
        own = {"data.forget": job.data.forget, "data.retain": job.data.retain + job.data.holdout}
        for name, items in {**own, **{f"evaluate.sets.{name}": items for name, items in job.data.sets.items()}}.items():
            try:
                if items:
                    stage.rows(items, tokenizer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if job.processes.first:
            job.folder.settle()
            for name in ("memorise", "unlearn", "retrain", "reinforce"):
                if job.folder.result(name).is_dir():
                    job.folder.remove_training(name)  # what a kill has left of it
    if job.config.memorise is not None and not job.folder.memorised.is_dir():
        job.console.print("[bold]memorise[/] so that there is something to forget")
        memorise(stage, job.config.memorise, model, tokenizer, job.data)
        save(job, "memorise", model, tokenizer)
    return model, tokenizer, stage


def check_trainings(job: Job[RunConfig], stage: Stage, model: Any) -> None:
    """Raises what `check_model`, `trained_names`, `add_adapter` and `training_arguments` raise, and ValueError for two
    models whose logits are combined."""
    config, lora = job.config, job.config.model.lora
    if parts_of(model) is not None:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path!r}: is two models whose logits are combined, which are not "
            "trained as one; needs a plain model"
        )
    with nullcontext(model) if lora is None else tried(model, **lora.adapter()) as trained:
        check_model(config.unlearn, config.geffect, trained)
    if config.unlearn.trains:
        training_arguments(stage, "unlearn", config.unlearn, rows_trained(config.unlearn, job.data))
    if (reinforced := config.unlearn.reinforce) is not None:
        read_anchors(reinforced.anchors)
        trained_names(model, reinforced)
        training_arguments(stage, "unlearn.reinforce", reinforced, len(job.data.forget))
    if config.memorise is not None:
        trained_names(model, config.memorise)
        training_arguments(stage, "memorise", config.memorise, len(to_memorise(config.memorise, job.data)))


def save(job: Job, stage: str, model: Any, tokenizer: Any) -> None:
    """The model that a stage leaves, whole; then the stage's resumable checkpoints go."""
    if job.processes.first:
        write_model(job.folder.result(stage), model, tokenizer)
        job.folder.remove_training(stage)
    job.processes.wait()


def adapters_base(job: Job[RunConfig]) -> str:
    """Where the model is found again that unlearning starts from: a folder's whole path, or a Hub id."""
    config = job.config
    name = config.model.name_or_path if config.memorise is None else str(job.folder.memorised)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def quiet_libraries() -> None:
    """One progress bar at a time: ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
