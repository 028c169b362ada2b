"""A progress bar with a rate and a remaining time, on a terminal only."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress"]


def progress(results: Iterable[Any], total: int, label: str, unit: str = "shard") -> Iterator[Any]:
    """Pass results on under a progress bar with rate and remaining time; silent where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (label and sys.stderr.isatty()), transient=False) as bar:
        task = bar.add_task(label, total=total, rate="")
        for result in results:
            bar.advance(task)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.2f} {unit}s/s" if speed else "")
            yield result
