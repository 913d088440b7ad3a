"""The bare continuous-batching pipeline in one process: the same requests, closed or open loop, no HTTP. The baseline
of `benchmarks.arms`.

Prints `ready`, waits for a line on standard input, works, prints the run as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Load, Run
from lightship.engine import EngineSettings
from lightship.serving.placement import places
from lightship.targets.openvino import properties


@dataclass
class Request:
    """A request on its way: its number in the load, when it was due, when its first and its last token came."""

    number: int
    due: float
    handle: Any
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    @property
    def tpot(self) -> float | None:
        """(last − first) / (tokens − 1)."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


class Bare:
    """The pipeline, with the settings that `lightship serve` has by default, or with what was tuned."""

    def __init__(self, folder: Path, new_tokens: int, settings: EngineSettings) -> None:
        import openvino_genai as genai

        settings = replace(settings, threads=settings.threads or places()[0].threads)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = settings.kv_cache_gb
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = settings.max_batched_tokens
        scheduler.enable_prefix_caching = settings.prefix_cache
        self._pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties(folder, settings))
        self._running = genai.GenerationStatus.RUNNING
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        self._config = genai.GenerationConfig()
        self._config.max_new_tokens = new_tokens
        self._config.set_eos_token_id(eos if isinstance(eos, int) else eos[0])
        self._count = 0

    def add(self, number: int, row: list[int], due: float) -> Request:
        """Ask for `row`."""
        import openvino as ov

        self._count += 1
        handle = self._pipeline.add_request(self._count, ov.Tensor(np.array([row], np.int64)), self._config)
        return Request(number, due, handle)

    def step(self, running: list[Request]) -> list[Request]:
        """One step; those that go on."""
        self._pipeline.step()
        now = time.perf_counter()
        for request in running:
            while request.handle.can_read():
                for output in request.handle.read().values():
                    request.first, request.last = request.first or now, now
                    request.tokens += len(output.generated_ids)
        return [request for request in running if request.handle.get_status() == self._running]


def run(bare: Bare, load: Load) -> Run:
    """All rows of the load, through to the last answer."""
    may_start, due = _closed(load) if load.times is None else _open(load.times)
    waiting, running, done = list(enumerate(load.rows))[::-1], list[Request](), list[Request]()
    began = time.perf_counter()
    while waiting or running:
        while waiting and may_start(waiting[-1][0], len(running), time.perf_counter() - began):
            number, row = waiting.pop()
            running.append(bare.add(number, row, began + due(number, time.perf_counter() - began)))
        if not running:
            time.sleep(0.001)
            continue
        left = bare.step(running)
        done += [request for request in running if request not in left]
        running = left
    seconds = time.perf_counter() - began
    done.sort(key=lambda request: request.number)
    tokens = sum(request.tokens for request in done)
    return Run(tokens, seconds, [each.first - each.due for each in done], [each.tpot for each in done])


Rules = tuple[Callable[[int, int, float], bool], Callable[[int, float], float]]


def _closed(load: Load) -> Rules:
    """(whether request i may start beside so many at a time, when it was due)."""
    clients = load.clients
    assert clients is not None
    return (lambda number, running, now: running < clients), (lambda number, now: now)


def _open(times: list[float]) -> Rules:
    return (lambda number, running, now: times[number] <= now), (lambda number, now: times[number])


def main() -> None:
    """Print the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inprocess", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("load", type=Path, help="a `benchmarks.load.Load`")
    parser.add_argument("--settings", type=json.loads, default={}, help="an `EngineSettings` as JSON")
    asked = parser.parse_args()
    load = Load.read(asked.load)
    bare = Bare(asked.folder, load.new, EngineSettings(**asked.settings))
    run(bare, load.warming)  # prompts that are not measured
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asdict(run(bare, load))))


if __name__ == "__main__":
    main()
