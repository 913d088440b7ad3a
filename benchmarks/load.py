"""`lightship.bench` for the benchmarks: a closed or an open loop over given prompts, a connection each, as one line of
JSON.

It shares the cores with what it measures; `benchmarks.arms` lets it drain a stub while the baseline is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lightship.bench import loop
from lightship.bench.loop import closed_loop, open_loop
from lightship.bench.prompts import Manner
from lightship.bench.schedule import Schedule
from lightship.bench.trace import Line, Trace
from lightship.bench.wire import Door, Place


@dataclass(frozen=True)
class Load:
    """Prompts as token ids and the tokens of each answer. `clients` in a closed loop, or `times`, seconds after the
    start at which each of `rows` is due. `warm` is asked before, and measured nowhere. `counted`: tokens are seen by
    the usage that comes with each, since the model says many that have no text."""

    warm: list[list[int]]
    rows: list[list[int]]
    new: int
    clients: int | None = None
    times: list[float] | None = None
    counted: bool = False

    @property
    def warming(self) -> Load:
        """The warm-up, as a load of its own."""
        return Load([], self.warm, self.new, self.clients or 1)

    def write(self, path: Path) -> Path:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def read(path: Path) -> Load:
        """What `write` wrote."""
        return Load(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Run:
    """What one arm did: output tokens, seconds, and of each request the times to the first token and between tokens,
    seconds, in the order of the load; None where there is none."""

    tokens: int
    seconds: float
    ttft: list[float | None]
    tpot: list[float | None]

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds

    def middle(self, name: str) -> float:
        """The median of `ttft` or `tpot`, seconds."""
        return statistics.median(value for value in getattr(self, name) if value is not None)

    def mean(self, name: str) -> float:
        """The mean alike."""
        return statistics.fmean(value for value in getattr(self, name) if value is not None)

    def high(self, name: str) -> float:
        """The 90th percentile alike; infinite when more than a tenth have none."""
        return float(np.percentile([math.inf if value is None else value for value in getattr(self, name)], 90,
                                   method="higher"))  # fmt: skip

    def missed(self, ttft: float, tpot: float) -> list[int]:
        """The places of the requests that did not keep both limits."""
        pairs = enumerate(zip(self.ttft, self.tpot, strict=True))
        return [place for place, (a, b) in pairs if a is None or a > ttft or b is None or b > tpot]

    def within(self, ttft: float, tpot: float) -> float:
        """The share of requests that kept both limits."""
        return 1 - len(self.missed(ttft, tpot)) / len(self.ttft)

    @staticmethod
    def joined(runs: Sequence[Run]) -> Run:
        """All requests of several runs."""
        tokens, seconds = sum(run.tokens for run in runs), sum(run.seconds for run in runs)
        return Run(tokens, seconds, [t for run in runs for t in run.ttft], [t for run in runs for t in run.tpot])

    @staticmethod
    def of(run: loop.Run) -> Run:
        """The same figures of a run of the generator."""
        tokens = sum(each.tokens for each in run.seen)
        return Run(tokens, run.seconds, [each.ttft for each in run.seen], [each.tpot for each in run.seen])


async def generate(url: str, load: Load, record: Path | None = None) -> Run:
    """Put the load on: streamed completion requests, greedy, with their usage. `record` gets the stream of one more."""
    door = Door(Place.of(url), keep_alive=False)
    requests = Trace(tuple(Line(row, load.new, None) for row in load.rows), Manner(continuous=load.counted))
    if load.times is None:
        assert load.clients is not None
        run = whole(await closed_loop(door, requests, load.clients))
    else:
        run = await open_loop(door, requests, Schedule(tuple(load.times), 0, 0.0))
    if record is not None:
        asked = requests.asked(0)
        answer = await door.send(door.request("POST", asked.path, asked.body))
        record.write_bytes(await answer.read())
        answer.close()
    return Run.of(run)


def whole(run: loop.Run) -> loop.Run:
    """`run`; an error unless every request was answered."""
    if bad := [each for each in run.seen if each.outcome != "whole"]:
        raise SystemExit(f"{len(bad)} requests failed, the first so: {bad[0].outcome}, {bad[0].reason}")
    return run


def main() -> None:
    """Print the run as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("load", type=Path, help="a `Load`")
    parser.add_argument("--warm", action="store_true", help="only the warm-up")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--told", action="store_true", help="print `ready`, and begin at a line on standard input")
    asked = parser.parse_args()
    load = Load.read(asked.load)
    if asked.told:
        print("ready", flush=True)
        sys.stdin.readline()
    if asked.warm:
        load = load.warming
    print(json.dumps(asdict(asyncio.run(generate(asked.url, load, asked.record)))))


if __name__ == "__main__":
    main()
