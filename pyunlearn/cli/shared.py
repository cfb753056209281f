"""What the commands share: options, how an error ends, and the command line that goes on."""

from __future__ import annotations

import errno
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from safetensors import SafetensorError

from .._terminal import shown

T = TypeVar("T")  # of an option that one command needs and another may leave out

# What bad input raises anywhere in the package; anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, IndexError, OSError, ImportError, ArithmeticError, SafetensorError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override one key of the configuration, e.g. unlearn.learning_rate=1e-4 (repeatable).",
    ),
]
Model = Annotated[T, typer.Option(help="Hub id or folder.")]
Data = Annotated[
    T,
    typer.Option(
        "--data",
        "--forget",
        help="File of JSON lines, a JSON list, CSV, TSV, parquet or text; or Hub id of a data set.",
    ),
]
Forget = Annotated[str | None, typer.Option(help="What to forget: a file, or Hub id of a data set.")]
Retain = Annotated[str | None, typer.Option(help="What to keep, in the same form; none: nothing keeps it in place.")]
Recipe = Annotated[str | None, typer.Option(help="A method by name, see `pyunlearn recipes`; also npo+mrd.")]
Lora = Annotated[bool, typer.Option("--lora", help="Train a small adapter in the model's place.")]
Refusals = Annotated[
    Path | None, typer.Option(help="A text file, one refusal a line, for idk, dpo and ap.", show_default=False)
]
Name = Annotated[str | None, typer.Option(help="Configuration name of a Hub data set, or of a file in a folder.")]
Columns = Annotated[
    str | None,
    typer.Option(
        help="What is what in the files, where the names are not usual ones.",
        metavar="question=A,answer=B",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="How questions are put: chat (the tokenizer's template), question_answer, llama2, llama3, phi, qwen, "
        "gemma, zephyr, open_unlearning, or plain (as they stand; texts need no question).",
        show_default="chat",
    ),
]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file inside --model.")]
Tokenizer = Annotated[str | None, typer.Option(help="Hub id or folder, where it is not the model's.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first samples of --data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples of a forward.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what was finished earlier, and begin anew.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def prose(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each paragraph of its help on one line: a terminal folds it where it is."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    command.__doc__ = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    return command


@contextmanager
def clean_errors(debug: bool) -> Iterator[None]:
    console = Console(stderr=True)
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise typer.Exit(130) from None
        if debug or not isinstance(error, USER_ERRORS):
            raise
        text = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            again = "with --resume goes on" if sys.argv[1:2] == ["run"] else "again"
            text += f"; free some space, then the same command {again}"
        console.print(f"[bold red]error:[/] [red]{shown(text)}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            console.print(shown(interrupt), highlight=False, soft_wrap=True)
        raise typer.Exit(getattr(interrupt, "exit_code", 130)) from None


def is_interrupt(error: BaseException) -> bool:
    """Whether it comes of Ctrl-C: libraries turn that into errors of their own while they are imported."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        if isinstance(following, KeyboardInterrupt) or "KeyboardInterrupt" in str(following):
            return True
        seen.add(id(following))
        following = following.__cause__ or following.__context__
    return False


def command_line() -> str:
    """What was typed, without the words that throw earlier work away or take it up."""
    return shlex.join(["pyunlearn", *(word for word in sys.argv[1:] if word not in ("--overwrite", "--resume"))])
