"""One progress bar for everything that walks through samples in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def track(batches: Sequence[list[int]], description: str, show: bool) -> Iterator[list[int]]:
    """The batches one by one; with `show`, a bar on stderr that counts their samples."""
    if not show:
        yield from batches
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=sum(map(len, batches)))
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))
