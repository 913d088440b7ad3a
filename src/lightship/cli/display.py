"""For people: progress on standard error, with an ETA on a terminal and as plain lines elsewhere, and plans."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

    from lightship.preflight import Plan

Listener = Callable[[str], None]


@contextlib.contextmanager
def stages() -> Iterator[Listener]:
    """A listener for a pipeline's progress lines; a line such as `[3/9, 16%] export` opens a stage. It raises
    `KeyboardInterrupt` where Ctrl-C came before and was swallowed, as by some libraries while they are imported."""
    with _interrupts() as heard, _live() if sys.stderr.isatty() else _plain() as listener:

        def listen(line: str) -> None:
            if heard:
                raise KeyboardInterrupt
            listener(line)

        yield listen


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """What is no longer empty once Ctrl-C came; always is outside the main thread, and where Ctrl-C is ignored."""
    heard: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    ordinary = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ordinary or threading.current_thread() is not threading.main_thread():
        yield heard
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _plain() -> Iterator[Listener]:
    began = time.monotonic()
    yield lambda line: click.echo(f"{time.monotonic() - began:6.1f}s  {line}", err=True)


@contextlib.contextmanager
def _live() -> Iterator[Listener]:
    from rich.console import Console
    from rich.live import Live

    bar = Bar()
    console = Console(stderr=True, highlight=False)
    with Live(console=console, get_renderable=bar.render, refresh_per_second=4, transient=True):

        def listen(line: str) -> None:
            if line.startswith("["):
                bar.open(line)
            console.print(line, markup=False)

        yield listen


class Bar:
    """One line: stage, share done, elapsed, ETA. The ETA is the elapsed time scaled by the share still to come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._line = "starting"
        self._done = 0.0  # share before the stage that runs
        self._whole: float | None = None  # seconds the run will take, by what has passed

    def open(self, line: str) -> None:
        """A stage begins: `[number/of, share] name`; where no share is predicted all stages count equally."""
        inside, _, name = line[1:].partition("] ")
        place, _, share = inside.partition(", ")
        number, of = map(int, place.split("/"))
        self._line = f"[{place}] {name}"
        self._done = int(share.removesuffix("%")) / 100 if share else (number - 1) / of
        elapsed = self._clock() - self._began
        self._whole = elapsed / self._done if self._done > 0 else None

    def text(self) -> str:
        """`[3/9] export   16 %   0:45, about 3:20 left`."""
        elapsed = self._clock() - self._began
        left = "" if self._whole is None else f", about {_clock(max(self._whole - elapsed, 0))} left"
        return f"{self._line}   {self._done:.0%}   {_clock(elapsed)}{left}"

    def render(self) -> Text:
        """The line for rich."""
        from rich.text import Text

        return Text(self.text(), style="bold")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print what a run would do, stage by stage."""
    from lightship.preflight import duration, gigabytes

    if as_json:
        click.echo(json.dumps(plan.to_dict()))
        return
    for step in plan.steps:
        cost = step.cost
        figures = "done before" if step.done else ""
        if cost and not step.done:
            written = gigabytes(cost.kept + cost.passing) if cost.kept + cost.passing else "nothing"
            figures = f"{duration(cost.seconds):12}{gigabytes(cost.memory):>8} of memory, writes {written}"
        click.echo(f"{step.name:22}{figures}".rstrip())
    click.echo(f"\nworks in      {plan.work}\nwould write   {plan.out}"
               + (f", {gigabytes(plan.result)}" if plan.predicted else ""))  # fmt: skip
    click.echo(plan.said())
