"""A long run at the knee with clients that leave and clients that send garbage, then ten times that rate.

Open loop: requests arrive by a Poisson process whatever the server does; latency counts from the arrival. The knee is
the highest tried share of the closed-loop capacity at which 95 % of the requests meet both limits. No two prompts are
the same, so that the prefix cache helps in no phase.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.load import closed_loop
from benchmarks.page import DOCS, put, table
from benchmarks.preflight import resident
from benchmarks.serve import server
from lightship.bundle import Bundle
from lightship.calibration import default_text
from lightship.evaluation.memory import tree
from lightship.tokenizer import load_tokenizer

PAGE = DOCS / "reliability.md"
IN, OUT = 200, 64  # tokens of a prompt and of an answer
SHARES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)  # of the closed-loop capacity
STEP = 60  # seconds at each
TTFT, TPOT = 3.0, 0.25  # seconds: the limits of the knee
LEAVES, GARBAGE = 0.10, 0.05  # shares of the requests
STUCK = 120.0  # seconds after which a request counts as stuck
RUBBISH = [b"{", b"\xff\xfe\x00", b'{"prompt": NaN}', b'{"prompt": "a", "max_tokens": 99999999999999999999}',
           b"[" * 5000, b'{"prompt": "a", "temperature": -1}', b"", b'{"prompt": {"a": 1}}']  # fmt: skip


@dataclass
class Seen:
    """What one request saw. `ttft` and `tpot` in seconds; None where it got no tokens."""

    kind: str  # healthy, leaves, garbage
    outcome: str  # whole, left, refused <status>, told (an error event), lost (broken off), stuck
    ttft: float | None = None
    tpot: float | None = None
    retry_after: bool = False


@dataclass
class Phase:
    """All requests of one phase, and memory over its time: seconds, bytes of RSS of the process that answers HTTP,
    and of those that compute."""

    seen: list[Seen] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)

    def healthy(self) -> list[Seen]:
        """Those that stayed and asked for something sensible."""
        return [each for each in self.seen if each.kind == "healthy"]

    def p95(self, name: str) -> float:
        """Of the admitted healthy requests."""
        values = [value for each in self.healthy() if (value := getattr(each, name)) is not None]
        return float(np.percentile(values, 95)) if values else float("nan")

    def grown(self, column: int) -> str:
        """Of one column of the memory, MB: `first → last (slope a minute, least squares over the second half)`."""
        half = np.array(self.memory[len(self.memory) // 2 :])
        slope = np.polyfit(half[:, 0] / 60, half[:, column] / 1e6, 1)[0] if len(half) > 2 else float("nan")
        return f"{self.memory[0][column] / 1e6:.0f} → {self.memory[-1][column] / 1e6:.0f} ({slope:+.1f})"


async def ask(host: str, port: int, kind: str, body: bytes, arrived: float) -> Seen:
    """One request, to its end or until it leaves."""
    try:
        async with asyncio.timeout(STUCK):
            return await _ask(host, port, kind, body, arrived)
    except TimeoutError:
        return Seen(kind, "stuck")
    except (ConnectionError, asyncio.IncompleteReadError):
        return Seen(kind, "lost")


async def _ask(host: str, port: int, kind: str, body: bytes, arrived: float) -> Seen:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = await reader.readuntil(b"\r\n\r\n")
        if status != 200:
            await reader.read()
            return Seen(kind, f"refused {status}", retry_after=b"retry-after:" in headers.lower())
        first = last = 0.0
        pieces, finished, told = 0, False, False
        async for line in reader:
            if line.startswith(b"data: {") and b'"text":""' not in line and b'"choices":[]' not in line:
                last = time.perf_counter()
                first, pieces = first or last, pieces + 1
                told = told or b'"error":' in line
                if kind == "leaves" and pieces >= 5:
                    return Seen(kind, "left", first - arrived)
            finished = finished or line == b"data: [DONE]\n"
        outcome = "told" if told else "whole" if finished else "lost"
        return Seen(kind, outcome, first - arrived, (last - first) / (pieces - 1) if pieces > 1 else None)
    finally:
        writer.close()


class Prompts:
    """Pieces of English prose that begin at places drawn by chance."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids, self._chance = ids, random.Random(1)

    def body(self) -> bytes:
        """One streamed completion request, greedy, whose first token no other has at this place of the text."""
        start = self._chance.randrange(len(self._ids) - IN)
        row = [self._chance.choice(self._ids), *self._ids[start + 1 : start + IN]]
        return json.dumps({"prompt": row, "max_tokens": OUT, "temperature": 0, "stream": True,
                           "stream_options": {"include_usage": True}}).encode()  # fmt: skip


async def phase(url: str, pid: int, prompts: Prompts, rate: float, seconds: float, mixed: bool) -> Phase:
    """Requests at `rate` a second for `seconds`, then wait for all of them."""
    place, found, chance = urlsplit(url), Phase(), random.Random(0)
    host, port = place.hostname or "", place.port or 80
    began, tasks, at = time.perf_counter(), [], 0.0
    sampling = asyncio.create_task(_sample(pid, began, found))
    while (at := at + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        draw = chance.random() if mixed else 1.0
        kind = "garbage" if draw < GARBAGE else "leaves" if draw < GARBAGE + LEAVES else "healthy"
        body = chance.choice(RUBBISH) if kind == "garbage" else prompts.body()
        tasks.append(asyncio.create_task(ask(host, port, kind, body, began + at)))
    found.seen = list(await asyncio.gather(*tasks))
    sampling.cancel()
    return found


async def _sample(pid: int, began: float, found: Phase) -> None:
    while True:
        sizes = await asyncio.to_thread(lambda: [resident(each) for each in tree(pid)])  # `pid` first
        found.memory.append((time.perf_counter() - began, sizes[0], sum(sizes[1:])))
        await asyncio.sleep(5)


async def knee(url: str, pid: int, prompts: Prompts, seconds: float) -> tuple[float, list[list[str]]]:
    """The rate, and a row for each share that was tried; the first that fails ends it."""
    requests = [prompts.body() for _ in range(96)]
    load = await closed_loop(url, requests, 16)
    capacity, rows, best = len(requests) / load.seconds, [], 0.0
    for share in SHARES:
        found = await phase(url, pid, prompts, capacity * share, seconds, mixed=False)
        healthy = found.healthy()
        good = sum(each.outcome == "whole" and (each.ttft or 0) <= TTFT and (each.tpot or 0) <= TPOT
                   for each in healthy) / max(len(healthy), 1)  # fmt: skip
        rows.append([f"{capacity * share:.2f}", f"{share:.1f}", str(len(healthy)), f"{good:.0%}",
                     f"{found.p95('ttft'):.2f}", f"{1000 * found.p95('tpot'):.0f}"])  # fmt: skip
        print(rows[-1], flush=True)
        if good < 0.95:
            break
        best = capacity * share
    return best or capacity * SHARES[0], rows


def outcomes(found: Phase) -> str:
    """`1 200 whole, 3 refused 429, …` of each kind."""
    kinds = {}
    for each in found.seen:
        kinds.setdefault(each.kind, Counter())[each.outcome] += 1
    return "; ".join(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
                     for kind, counts in sorted(kinds.items()))  # fmt: skip


def report(name: str, rate: float, found: Phase) -> list[str]:
    """A row of the table."""
    refused = [each for each in found.seen if each.outcome in ("refused 429", "refused 503")]
    told_when = f"{sum(each.retry_after for each in refused)} of {len(refused)}"
    return [name, f"{rate:.2f}", str(len(found.seen)), outcomes(found), f"{found.p95('ttft'):.2f}",
            f"{1000 * found.p95('tpot'):.0f}", found.grown(1), found.grown(2), told_when]  # fmt: skip


async def soak(url: str, pid: int, prompts: Prompts, minutes: float) -> str:
    """All phases; returns the section."""
    rate, sweep = await knee(url, pid, prompts, STEP)
    long = await phase(url, pid, prompts, rate, 60 * minutes, mixed=True)
    print(outcomes(long), flush=True)
    flood = await phase(url, pid, prompts, 10 * rate, 60, mixed=True)
    rows = [["phase", "requests/s", "requests", "outcomes", "TTFT p95, s", "TPOT p95, ms",
             "RSS of the API, MB (a minute)", "RSS of the engine, MB (a minute)", "429 and 503 with Retry-After"],
            report(f"{minutes:g} minutes at the knee", rate, long),
            report("1 minute at ten times that", 10 * rate, flood)]  # fmt: skip
    head = ["requests/s", "of capacity", "n", "within both limits", "TTFT p95, s", "TPOT p95, ms"]
    return (f"{table([head, *sweep])}\n\n{table(rows)}\n\n{IN} tokens in, {OUT} out, greedy, streamed; limits of the "
            f"knee: TTFT ≤ {TTFT:g} s and TPOT ≤ {1000 * TPOT:.0f} ms for 95 % of the requests. {LEAVES:.0%} leave "
            f"after five pieces, {GARBAGE:.0%} send garbage; p95 over the healthy requests that were admitted. "
            f"Stuck: no end within {STUCK:.0f} s. Memory a minute: over the second half of the phase.")  # fmt: skip


def main() -> None:
    """Serve the bundle and run all phases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--port", type=int, default=18_900)
    asked = parser.parse_args()
    tokenizer = load_tokenizer(Bundle.open(asked.bundle).target_folder("openvino"))
    ids = tokenizer.encode("".join(each.text for each in default_text().documents), add_special_tokens=False).ids
    with server(asked.bundle, asked.port) as (url, pid, _):
        put("soak", asyncio.run(soak(url, pid, Prompts(ids), asked.minutes)), PAGE)


if __name__ == "__main__":
    main()
