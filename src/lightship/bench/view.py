"""Progress while a measurement runs: one live line on a terminal, a line a phase elsewhere; on standard error."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lightship.bench.client import Seen

if TYPE_CHECKING:
    from rich.console import RenderableType

WINDOW = 5.0  # seconds over which the tokens a second are shown
RECENT = 50  # requests whose median is shown


class Board:
    """Counts what a loop reports, and draws it."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._clock, self._say = clock, say
        self._open("starting", None, None)

    def _open(self, name: str, requests: int | None, seconds: float | None) -> None:
        self._name, self._requests, self._seconds = name, requests, seconds
        self._began = self._clock()
        self._sent = 0
        self._outcomes: Counter[str] = Counter()
        self._tokens: deque[tuple[float, int]] = deque()
        self._ttft: deque[float] = deque(maxlen=RECENT)
        self._tpot: deque[float] = deque(maxlen=RECENT)

    def begin(self, name: str, requests: int | None, seconds: float | None) -> None:
        """See `Watch`."""
        self._open(name, requests, seconds)
        bounds = [f"{requests} requests"] if requests is not None else []
        bounds += [f"{seconds:.0f} s"] if seconds is not None else []
        self._say(f"{name}: {' or '.join(bounds) or 'no end'}")

    def sent(self) -> None:
        """See `Watch`."""
        self._sent += 1

    def seen(self, seen: Seen) -> None:
        """See `Watch`."""
        self._outcomes[seen.outcome] += 1
        self._tokens.append((self._clock(), seen.tokens))
        if seen.ttft is not None:
            self._ttft.append(seen.ttft)
        if seen.tpot is not None:
            self._tpot.append(seen.tpot)

    def lines(self) -> list[tuple[str, str]]:
        """What is shown: names and values."""
        now = self._clock()
        elapsed, done = now - self._began, sum(self._outcomes.values())
        while self._tokens and self._tokens[0][0] < now - WINDOW:
            self._tokens.popleft()
        rate = sum(count for _, count in self._tokens) / max(min(WINDOW, elapsed), 0.1)
        shares = [done / self._requests] if self._requests else []
        shares += [elapsed / self._seconds] if self._seconds else []
        share = f", {min(max(shares), 1.0):.0%}" if shares else ""
        bad = done - self._outcomes["whole"] - self._outcomes["stopped"]
        return [
            (self._name, f"{elapsed:.0f} s{share}"),
            ("requests", f"{done} ended, {self._sent - done} running, {bad} without an answer"),
            ("TTFT", _median(self._ttft, 1, "s", ".2f")),
            ("TPOT", _median(self._tpot, 1e3, "ms", ".0f")),
            ("tokens/s", f"{rate:.0f} in the answers of the last {WINDOW:.0f} s"),
        ]

    def render(self) -> RenderableType:
        """For rich."""
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, text in self.lines():
            table.add_row(name, text)
        return table


def _median(values: deque[float], scale: float, unit: str, form: str) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values) * scale:{form}} {unit} (median of the last {len(values)})"


@contextlib.contextmanager
def watching(say: Callable[[str], None]) -> Iterator[Board]:
    """A board: live on a terminal, elsewhere `say` gets a line a phase."""
    if not sys.stderr.isatty():
        yield Board(say=say)
        return
    from rich.console import Console
    from rich.live import Live

    board = Board()
    console = Console(stderr=True, highlight=False)
    with Live(console=console, get_renderable=board.render, refresh_per_second=4, transient=True):
        yield board
