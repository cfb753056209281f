"""One progress bar for everything that walks through samples in batches, or through draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def track(
    items: Sequence[T], description: str, show: bool, size: Callable[[Any], int] = len, done: int = 0
) -> Iterator[T]:
    """The items one by one; with `show`, a bar on stderr that counts `size` of each, after `done` of earlier."""
    if not show:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=done + sum(map(size, items)), completed=done)
        for item in items:
            yield item
            bar.advance(task, size(item))
