"""Every request as a JSON line, so that others can compute what they like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightship.bench.figures import Limit, within
from lightship.bench.loop import Run
from lightship.errors import UsageError


class Record:
    """Writes runs to a file of its own; times in seconds after the run's start. Raises `UsageError` where it cannot."""

    def __init__(self, path: Path, limits: Sequence[Limit] = ()) -> None:
        self._path, self._limits = path, limits
        try:
            path.write_text("", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}", hint="choose another --record") from error

    def __call__(self, run: Run) -> None:
        """Add the requests of one run."""
        with self._path.open("a", encoding="utf-8") as file:
            for seen in run.seen:
                computed = {"ttft": seen.ttft, "tpot": seen.tpot, "e2e": seen.e2e, "delay": seen.delay,
                            "good": within(seen, self._limits)}  # fmt: skip
                file.write(json.dumps({"rate": run.rate, "clients": run.clients, **asdict(seen), **computed}) + "\n")
