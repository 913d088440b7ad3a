"""Progress for people: stages with elapsed time on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click


@contextlib.contextmanager
def stages(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A listener for a pipeline's progress lines; a line that begins with `[` opens a stage."""
    if quiet:
        yield lambda line: None
        return
    if not sys.stderr.isatty():
        began = time.monotonic()

        def plain(line: str) -> None:
            click.echo(f"{time.monotonic() - began:6.1f}s  {line}", err=True)

        yield plain
        return
    with _live() as listener:
        yield listener


@contextlib.contextmanager
def _live() -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def listen(line: str) -> None:
            if line.startswith("["):
                done, total = (int(part) for part in line[1 : line.index("]")].split("/"))
                progress.update(task, description=line, completed=done - 1, total=total)
            console.print(line, highlight=False, markup=False)

        yield listen
