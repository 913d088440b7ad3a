"""Another bundle twenty times while ten thousand requests are answered: none may fail.

Closed loop, half of the clients over connections that stay open, every second request streamed. An answer counts as
whole when it came with 200, said why it ended and how many tokens it has, and, streamed, ended with `[DONE]` and held
no error. The changes are spread over the requests and go back and forth between two bundles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.arms import started
from benchmarks.page import DOCS, put, spread, table
from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe
from lightship.serving.server import wait_ready
from tests.tiny import tiny_llama

PAGE = DOCS / "reliability.md"
REQUESTS, CHANGES, CLIENTS, OUT = 10_000, 20, 8, 16
STEPS = ("verify", "memory", "load", "warm up", "golden", "shift")


@dataclass
class Seen:
    """What all requests saw: when each began and ended (seconds), why some failed, and by what they were answered."""

    times: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    fingerprints: set[str] = field(default_factory=set)
    changes: list[tuple[float, float]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Requests that have ended."""
        return len(self.times)


async def one(client: httpx.AsyncClient, url: str, body: dict[str, Any], seen: Seen) -> None:
    """One request, to its end."""
    began = time.perf_counter()
    try:
        answer = await client.post(f"{url}/v1/completions", json=body)
        why = judged(answer, body["stream"], seen)
    except httpx.HTTPError as error:
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        seen.failures.append(why)
    seen.times.append((began, time.perf_counter()))


def judged(answer: httpx.Response, stream: bool, seen: Seen) -> str | None:
    """Why an answer is not whole; None for one that is."""
    if answer.status_code != 200:
        return f"{answer.status_code}: {answer.text[:200]}"
    if not stream:
        chunks = [answer.json()]
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
        if lines[-1:] != ["[DONE]"]:
            return f"a stream that broke off: {answer.text[-200:]!r}"
        chunks = [json.loads(line) for line in lines[:-1]]
    if told := [chunk for chunk in chunks if "error" in chunk]:
        return f"an error in a stream: {told[0]}"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    if len(reasons) != 1 or not chunks[-1]["usage"]:
        return f"no end: {chunks[-1]}"
    seen.fingerprints |= {chunk["system_fingerprint"] for chunk in chunks}
    return None


async def client(number: int, url: str, seen: Seen, ended: asyncio.Event, requests: int) -> None:
    """Ask until the changes are done and there were enough."""
    chance = random.Random(number)
    keep = httpx.Limits(max_keepalive_connections=number % 2)
    async with httpx.AsyncClient(limits=keep, timeout=120, trust_env=False) as asking:
        while not ended.is_set() or seen.count < requests:
            stream = chance.random() < 0.5
            body = {"prompt": [chance.randrange(4, 500) for _ in range(chance.randrange(4, 100))], "max_tokens": OUT,
                    "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}  # fmt: skip
            await one(asking, url, body, seen)


async def changing(url: str, bundles: list[Path], seen: Seen, requests: int, changes: int) -> None:
    """Change to the next bundle whenever the next share of the requests is answered."""
    async with httpx.AsyncClient(timeout=None, trust_env=False) as asking:
        for number in range(1, changes + 1):
            while seen.count < requests * number / (changes + 1):
                await asyncio.sleep(0.05)
            began = time.perf_counter()
            asked = {"bundle": str(bundles[number % len(bundles)])}
            answer = await asking.post(f"{url}/admin/reload", json=asked)
            seen.changes.append((began, time.perf_counter()))
            if answer.status_code != 200:
                raise SystemExit(f"a change failed: {answer.text}")
            seen.answers.append(answer.json())
            print(f"{number} changes, {seen.count} requests, {len(seen.failures)} failed", flush=True)


async def run(url: str, bundles: list[Path], requests: int, changes: int) -> Seen:
    """All of it."""
    seen, ended = Seen(), asyncio.Event()
    async with asyncio.TaskGroup() as group:  # where a client fails by itself all end
        for number in range(CLIENTS):
            group.create_task(client(number, url, seen, ended, requests))
        await changing(url, bundles, seen, requests, changes)
        ended.set()
    return seen


def latencies(seen: Seen, during: bool) -> str:
    """p50, p95 and largest, seconds, of the requests that ran while a change was under way, or of the others."""
    values = [end - begin for begin, end in seen.times
              if any(begin < stop and end > start for start, stop in seen.changes) is during]  # fmt: skip
    p50, p95 = np.percentile(values, [50, 95])
    return f"{p50:.3f}, {p95:.3f}, {max(values):.3f} (n = {len(values)})"


def report(seen: Seen, seconds: float, names: str) -> str:
    """The section."""
    head = ["requests", "failed", "changes", "seconds", "latency between changes: p50, p95, largest, s", "during them"]
    row = [str(seen.count), str(len(seen.failures)), str(len(seen.changes)), f"{seconds:.0f}",
           latencies(seen, False), latencies(seen, True)]  # fmt: skip
    parts = {step: [each["seconds"] for answer in seen.answers for each in answer["steps"] if each["step"] == step]
             for step in STEPS}  # fmt: skip
    whole = [stop - start for start, stop in seen.changes]
    steps = table([["a change, s", *STEPS], [spread(whole), *(spread(parts[step], ".3f") for step in STEPS)]])
    golden = statistics.median(answer["golden"]["mean"] for answer in seen.answers)
    assert len(seen.fingerprints) == 2, seen.fingerprints
    return (f"{table([head, row])}\n\n{steps}\n\n{CLIENTS} clients in a closed loop, {OUT} tokens out, every second "
            f"request streamed, back and forth between {names}; medians (lowest – highest). Golden rows on the served "
            f"path: {golden:.1e} nats, median.")  # fmt: skip


def tiny(folder: Path) -> list[Path]:
    """A random llama of two layers as two bundles."""
    checkpoint = tiny_llama(folder / "model")
    for precision in ("fp32", "int8"):
        ship(Recipe(source=str(checkpoint.folder), precision=Precision(name=precision)), folder / f"tiny-{precision}")
    return [folder / "tiny-fp32", folder / "tiny-int8"]


def main() -> None:
    """Print the section and put it into docs/reliability.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reloads", description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="*", help="two bundles (default: of a tiny random llama)")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--changes", type=int, default=CHANGES)
    asked = parser.parse_args()
    if len(asked.bundles) not in (0, 2):
        parser.error("give two bundles, or none")
    with tempfile.TemporaryDirectory() as folder:
        bundles = [path.absolute() for path in asked.bundles] or tiny(Path(folder))
        command = ["lightship", "serve", str(bundles[0]), "--port", str(asked.port), "--keys", f"{folder}/none.json"]
        with started(command, stderr=subprocess.DEVNULL) as process:
            url = f"http://127.0.0.1:{asked.port}"
            wait_ready(url, alive=lambda: process.poll() is None)
            began = time.perf_counter()
            seen = asyncio.run(run(url, bundles, asked.requests, asked.changes))
            text = report(seen, time.perf_counter() - began, " and ".join(path.name for path in bundles))
    if (asked.requests, asked.changes) == (REQUESTS, CHANGES):
        put("reloads", text, PAGE)
    else:
        print(text)
    for why in seen.failures[:10]:
        print(why, file=sys.stderr)
    sys.exit(1 if seen.failures else 0)


if __name__ == "__main__":
    main()
