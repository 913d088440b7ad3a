"""Requests from a file: one JSON object a line, `{"at": seconds, "prompt": … or "messages": […], "max_tokens": n}`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightship.bench.client import Asked
from lightship.bench.prompts import Manner
from lightship.bench.schedule import Schedule
from lightship.errors import UsageError

KEYS = {"at", "prompt", "messages", "max_tokens"}


@dataclass(frozen=True)
class Line:
    """One request of a trace."""

    content: Any
    max_tokens: int | None
    at: float | None


@dataclass(frozen=True)
class Trace:
    """A trace, in the order of its times. An answer that the model ends before `max_tokens` is what was wanted."""

    lines: tuple[Line, ...]
    manner: Manner

    @property
    def count(self) -> int:
        """How many requests it has."""
        return len(self.lines)

    @property
    def timed(self) -> bool:
        """Whether it says when each is due."""
        return self.lines[0].at is not None

    def asked(self, number: int, at: float | None = None) -> Asked:
        line = self.lines[number]
        return self.manner.asked(number, line.content, line.max_tokens, False, at)

    def schedule(self, warmup: int = 0, count: int | None = None, seconds: float | None = None) -> Schedule:
        """Its own times, from the first on; `warmup`, `count` and `seconds` as in `poisson`."""
        times = [line.at - (self.lines[0].at or 0.0) for line in self.lines if line.at is not None]
        opens = times[warmup] if warmup < len(times) else 0.0
        end = float("inf") if seconds is None else opens + seconds
        kept = [at for at in times if at < end][: None if count is None else warmup + count]
        if len(kept) <= warmup:
            raise UsageError(f"the trace has {self.count} requests, and the first {warmup} are warm-up",
                             hint="give a smaller --warmup")  # fmt: skip
        return Schedule(tuple(kept), warmup, opens)


@dataclass
class Round:
    """The lines of a trace over and over, from the one at `start` on, whatever their times. `used`: how many requests
    were made of them."""

    trace: Trace
    start: int
    used: int = 0
    count: None = None

    def asked(self, number: int, at: float | None = None) -> Asked:
        self.used = max(self.used, number + 1)
        asked = self.trace.asked((self.start + number) % self.trace.count, at)
        return replace(asked, number=number)


def read_trace(path: Path) -> Trace:
    """The trace in `path`. Raises `UsageError` naming the line at fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    rows = [(number, row) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    lines = [_line(row, f"{path}:{number}") for number, row in rows]
    if not lines:
        raise UsageError(f"{path} has no requests", hint='a line: {"at": 0.5, "prompt": "…", "max_tokens": 64}')
    if len({line.at is None for line in lines}) > 1:
        raise UsageError(f"{path}: some requests have a time and some have none", hint='give "at" to all, or to none')
    return Trace(tuple(sorted(lines, key=lambda line: line.at or 0.0)), Manner())


def _line(row: str, where: str) -> Line:
    try:
        found = json.loads(row)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or set(found) - KEYS or ("prompt" in found) == ("messages" in found):
        raise UsageError(f'{where} must be an object with "prompt" or "messages", and may have "at" and "max_tokens"')
    content = found.get("prompt", found.get("messages"))
    known = _is_text(content) or _is_ids(content) if "prompt" in found else _is_messages(content)
    if not known:
        raise UsageError(f"{where}: a prompt is a text or a list of token ids, messages are a list of objects")
    at, limit = found.get("at"), found.get("max_tokens")
    if at is not None and (not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < float("inf")):
        raise UsageError(f'{where}: "at" is seconds after the start, not {at!r}')
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UsageError(f'{where}: "max_tokens" is a number of tokens, not {limit!r}')
    return Line(content, limit, None if at is None else float(at))


def _is_text(content: Any) -> bool:
    return isinstance(content, str) and bool(content)


def _is_ids(content: Any) -> bool:
    return _is_list_of(content, int) and not any(isinstance(each, bool) for each in content)


def _is_messages(content: Any) -> bool:
    return _is_list_of(content, dict)


def _is_list_of(content: Any, kind: type) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(each, kind) for each in content)


def needs_ids(lines: Sequence[Line]) -> bool:
    """Whether a prompt is given as token ids, which the chat route does not take."""
    return any(_is_ids(line.content) for line in lines)
