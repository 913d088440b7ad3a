"""`lightship.bench` for the benchmarks: a closed loop over given prompts, a connection each, as one line of JSON.

It shares the cores with what it measures; `benchmarks.serve` lets it drain a stub while the baseline is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from lightship.bench.loop import Run, closed_loop
from lightship.bench.prompts import Manner
from lightship.bench.trace import Line, Trace
from lightship.bench.wire import Door, Place


def source(rows: list[list[int]], new_tokens: int) -> Trace:
    """One streamed completion request a prompt, greedy, asking for its usage."""
    return Trace(tuple(Line(row, new_tokens, None) for row in rows), Manner())


async def load(url: str, requests: Trace, clients: int, record: Path | None = None) -> dict[str, Any]:
    """What one run saw: tokens, seconds, and the `ttft` and `tpot` of each request, seconds. `record` gets the
    stream of one more request."""
    door = Door(Place.of(url), keep_alive=False)
    run = await closed_loop(door, requests, clients)
    if record is not None:
        asked = requests.asked(0)
        answer = await door.send(door.request("POST", asked.path, asked.body))
        record.write_bytes(await answer.read())
        answer.close()
    return lists(run)


def lists(run: Run) -> dict[str, Any]:
    """Of a run of which every request must have been answered."""
    if bad := [each for each in run.seen if each.outcome != "whole"]:
        raise SystemExit(f"{len(bad)} requests failed, the first so: {bad[0].outcome}, {bad[0].reason}")
    return {
        "tokens": sum(each.tokens for each in run.seen),
        "seconds": run.seconds,
        "ttft": [each.ttft for each in run.seen],
        "tpot": [each.tpot for each in run.seen if each.tpot is not None],
    }


def main() -> None:
    """Print the run as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    requests = source(json.loads(asked.prompts.read_text()), asked.new)
    print(json.dumps(asyncio.run(load(asked.url, requests, asked.clients, asked.record))))


if __name__ == "__main__":
    main()
