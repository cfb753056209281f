"""The command line: `pyunlearn run`, `score`, `geffect`, `evaluate`, `objectives`, `doctor`.

User errors end in one red line and exit code 2; `--debug` shows the traceback. Ctrl-C exits with 130.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__

# What bad input raises anywhere in the package; anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, IndexError, OSError, ImportError, ArithmeticError)

app = typer.Typer(
    name="pyunlearn",
    help="Make a language model forget chosen samples, keep the rest, and measure both.",
    epilog="Start with [bold]pyunlearn run[/bold]: a small model memorises made-up authors and forgets a tenth.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the `pyunlearn` command."""
    app()


@contextmanager
def clean_errors(debug: bool) -> Iterator[None]:
    console = Console(stderr=True)
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        text = str(error) or type(error).__name__
        console.print(f"[bold red]error:[/] [red]{escape(text)}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            console.print(escape(str(interrupt)), highlight=False, soft_wrap=True)
        raise typer.Exit(getattr(interrupt, "exit_code", 130)) from None


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"pyunlearn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""[bold]Examples[/bold]

  pyunlearn run                                            the embedded demo: no network, about a minute

  pyunlearn run --set unlearn.forget=npo --set name=npo    the same with another objective

  pyunlearn run --set unlearn.retain='\\[kl, gd]'            two retain terms

  pyunlearn run --set unlearn.recipe=npo+mrd               a method by name, its samples drawn by MRD

  pyunlearn run examples/smollm2_tofu.yaml                 a pretrained model on TOFU

  pyunlearn run --resume                                   go on after Ctrl-C or a crash
"""
)
def run(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file; none: the embedded demo.", show_default=False, metavar="[CONFIG]"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Override one key, e.g. unlearn.learning_rate=1e-4 (repeatable).",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run where it stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run folder first.")] = False,
    debug: Debug = False,
) -> None:
    """Memorise (where asked), evaluate, unlearn, evaluate again, and write a report."""
    with clean_errors(debug):
        from ..runs import load_config
        from ..runs.run import run as run_job

        loaded = load_config(config, set_ or [])
        run_job(loaded, resume=resume, overwrite=overwrite, console=Console(), command=command_line())


def command_line() -> str:
    """What was typed, without the words that throw earlier work away or take it up."""
    return shlex.join(["pyunlearn", *(word for word in sys.argv[1:] if word not in ("--overwrite", "--resume"))])


@app.command(
    epilog="""[bold]Examples[/bold]

  pyunlearn score                                          the embedded demo: no network, a minute or two

  pyunlearn score --estimator gradient                     the same in seconds, to leading order

  pyunlearn score --model FOLDER --data forget.jsonl --out scores.jsonl

  torchrun --nproc_per_node 8 -m pyunlearn.cli score --model FOLDER --data forget.jsonl     draws shared out
"""
)
def score(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file of a run, whose forget set and first model are scored; none: the embedded demo.",
            show_default=False,
            metavar="[CONFIG]",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key of it (repeatable).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder, in the place of a configuration.")] = None,
    data: Annotated[str | None, typer.Option(help="JSON lines file, or Hub id of a data set; with --model.")] = None,
    name: Annotated[str | None, typer.Option(help="Configuration name of a Hub data set.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file inside --model.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or folder, where it is not the model's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples of --data.")] = None,
    estimator: Annotated[
        str, typer.Option(help="algorithm1, gradient (its leading order), definition, hutchinson or initial.")
    ] = "algorithm1",
    num_draws: Annotated[int, typer.Option(help="Draws of noise; more may be asked for later.")] = 200,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples of a forward.")] = 8,
    per_token: Annotated[bool, typer.Option("--per-token", help="Divide by the number of scored tokens.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="One JSON line a sample; a report, diagnostics and finished draws go beside it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the draws finished earlier.")] = False,
    debug: Debug = False,
) -> None:
    """Measure how hard each sample is to unlearn (Memory Removal Difficulty), with a report. Ctrl-C, then the same
    command, goes on where it stopped."""
    with clean_errors(debug):
        from ..runs import load_config
        from ..runs.config import FilesConfig
        from ..runs.score import score as score_job

        job: dict[str, Any] = {
            "overwrite": overwrite,
            "console": Console(),
            "command": command_line(),
            "estimator": estimator,
            "num_draws": num_draws,
            "sigma": sigma,
            "seed": seed,
            "batch_size": batch_size,
            "normalize": "tokens" if per_token else None,
        }
        source: dict[str, Any] = {"name": name, "gguf_file": gguf_file, "tokenizer": tokenizer, "limit": limit}
        if model is not None and data is not None and config is None and not set_:
            score_job(FilesConfig.of(model, data, **source), out=out, **job)
        elif model is None and data is None and all(value is None for value in source.values()):
            score_job(load_config(config, set_ or []), out=out, **job)
        else:
            raise ValueError("needs --model and --data (with their options), or a configuration (with --set), not both")


@app.command(
    epilog="""[bold]Examples[/bold]

  pyunlearn run --set unlearn.keep_steps=5               a run that keeps its model every 5 steps

  pyunlearn geffect --run runs/demo                      all of them; Ctrl-C, then the same command, goes on

  pyunlearn geffect --run runs/demo --pointwise --overwrite          each sample's own too

  pyunlearn run --set geffect.every=5                    while training instead, into the run's report
"""
)
def geffect(
    run: Annotated[Path, typer.Option("--run", help="Folder of a run, see unlearn.keep_steps.", metavar="DIR")],
    forget_samples: Annotated[
        int | None, typer.Option(min=1, help="Drawn once, by the run's seed.", show_default="the run's, or 32")
    ] = None,
    retain_samples: Annotated[int | None, typer.Option(min=1, show_default="the run's, or 32")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples of a backward.", show_default="the run's, or 8")
    ] = None,
    pointwise: Annotated[
        bool | None, typer.Option("--pointwise/--no-pointwise", help="Also each forget sample's own effect.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure everything again.")] = False,
    debug: Debug = False,
) -> None:
    """Measure the gradient effect (G-effect) along a run, from its saved models; writes DIR/geffect.

    The G-effect of an objective on a metric is the dot product of their gradients: a step of size lr down the objective
    changes the metric by -lr times it. Unlearning (negative log-likelihood of the forget set) wants it far below 0,
    retaining (of the retain set) wants it at 0 or above. Told for the whole objective and each of its terms, in total,
    by group of layers and by layer.
    """
    with clean_errors(debug):
        from ..runs.geffect import measure_run

        given = {"forget_samples": forget_samples, "retain_samples": retain_samples, "batch_size": batch_size,
                 "pointwise": pointwise}  # fmt: skip
        measure_run(
            run,
            overwrite=overwrite,
            console=Console(),
            command=command_line(),
            **{key: value for key, value in given.items() if value is not None},
        )


@app.command(
    epilog="""[bold]Example[/bold]

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --out records.jsonl
"""
)
def evaluate(
    model: Annotated[str, typer.Option(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="JSON lines file, or Hub id of a data set.")],
    name: Annotated[str | None, typer.Option(help="Configuration name of a Hub data set.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file inside --model.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or folder, where it is not the model's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    rouge_samples: Annotated[int, typer.Option(min=0, help="Samples to generate for; 0 is none.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[Path | None, typer.Option(help="Write one JSON line per sample here.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how well a model knows a set of answers."""
    with clean_errors(debug):
        from ..runs.config import FilesConfig
        from ..runs.evaluate import evaluate_files

        files = FilesConfig.of(
            model, data, name=name, gguf_file=gguf_file, tokenizer=tokenizer, limit=limit, batch_size=batch_size,
            rouge_samples=rouge_samples,
        )  # fmt: skip
        evaluate_files(files, out=out, console=Console(), command=command_line())


@app.command()
def objectives(debug: Debug = False) -> None:
    """List the objectives (role, what each needs, its options with their defaults) and the recipes made of them."""
    with clean_errors(debug):
        from ..objectives import table as objective_table
        from ..recipes import RECIPES

        table = Table("name", "role", "what it does", "options and defaults", "presets")
        for row in objective_table():
            options = "\n".join(f"{key} = {value}" for key, value in row.defaults.items() if key != "preset")
            table.add_row(row.name, row.role, escape(row.summary), escape(options), escape("\n".join(row.presets)))
        Console().print(table)
        named = Table("recipe", "forget", "retain", "samples drawn", title="unlearn.recipe=NAME, or NAME+mrd")
        for name, settings in RECIPES.items():
            terms = [", ".join(term["name"] for term in settings[role]) for role in ("forget", "retain")]
            by = settings.get("sampling", {"by": "shuffle"})["by"]
            named.add_row(name, *terms, by + (", one an update" if settings.get("batch_size") == 1 else ""))
        Console().print(named)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say what is built, what is missing and why, and which backend each operation takes."""
    with clean_errors(debug):
        from ..doctor import main as examine

        raise typer.Exit(examine() or 0)


if __name__ == "__main__":
    main()
