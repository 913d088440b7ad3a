"""A long run at the knee with clients that leave and clients that send garbage, then ten times that rate.

Open loop: requests arrive by a Poisson process whatever the server does; latency counts from the arrival. The knee is
the highest tried share of the closed-loop capacity at which 95 % of the requests meet both limits. No two prompts are
the same, so that the prefix cache helps in no phase.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.arms import server
from benchmarks.page import DOCS, put, table
from benchmarks.preflight import resident
from lightship.bench.client import Asked, Seen
from lightship.bench.figures import Distribution, Figures, Limit, figures
from lightship.bench.loop import closed_loop, open_loop
from lightship.bench.prompts import COMPLETIONS, Manner, Prose, Synthetic
from lightship.bench.schedule import poisson
from lightship.bench.sweep import Step, climb
from lightship.bench.wire import Door, Place
from lightship.bundle import Bundle
from lightship.evaluation.memory import tree

Kind = Literal["healthy", "leaves", "garbage"]
PAGE = DOCS / "reliability.md"
IN, OUT = 200, 64  # tokens of a prompt and of an answer
SHARES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of the closed-loop capacity
STEP = 180  # seconds at each; a minute shows less than what ten do
TTFT, TPOT = 3.0, 0.25  # seconds: the limits of the knee
LEAVES, GARBAGE = 0.10, 0.05  # shares of the requests
STUCK = 120.0  # seconds after which a request counts as stuck
RUBBISH = [b"{", b"\xff\xfe\x00", b'{"prompt": NaN}', b'{"prompt": "a", "max_tokens": 99999999999999999999}',
           b"[" * 5000, b'{"prompt": "a", "temperature": -1}', b"", b'{"prompt": {"a": 1}}']  # fmt: skip


@dataclass
class Phase:
    """All requests of one phase, and memory over its time: seconds, bytes of RSS of the process that answers HTTP,
    and of those that compute."""

    seen: list[tuple[Kind, Seen]] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)

    def healthy(self) -> list[Seen]:
        """Those that stayed and asked for something sensible."""
        return [each for kind, each in self.seen if kind == "healthy"]

    def p95(self, name: str) -> float:
        """Of the admitted healthy requests."""
        values = [value for each in self.healthy() if (value := getattr(each, name)) is not None]
        return float(np.percentile(values, 95)) if values else float("nan")

    def grown(self, column: int) -> str:
        """Of one column of the memory, MB: `first → last (slope a minute, least squares over the second half)`."""
        half = np.array(self.memory[len(self.memory) // 2 :])
        slope = np.polyfit(half[:, 0] / 60, half[:, column] / 1e6, 1)[0] if len(half) > 2 else float("nan")
        return f"{self.memory[0][column] / 1e6:.0f} → {self.memory[-1][column] / 1e6:.0f} ({slope:+.1f})"


def ended(seen: Seen) -> str:
    """whole, left, refused <status>, told (an error event), lost (broken off), stuck, or short."""
    if seen.outcome in ("refused", "failed") and seen.status != 200:
        return f"refused {seen.status}"
    return {"failed": "told", "broken": "lost", "timeout": "stuck"}.get(seen.outcome, seen.outcome)


@dataclass(frozen=True)
class Mixed:
    """Requests of which some leave and some are garbage, drawn by chance for each number."""

    prompts: Synthetic
    count: int | None = None

    def kind(self, number: int) -> Kind:
        """Of request `number`."""
        draw = random.Random(f"kind {number}").random()
        return "garbage" if draw < GARBAGE else "leaves" if draw < GARBAGE + LEAVES else "healthy"

    def asked(self, number: int, at: float | None = None) -> Asked:
        """Request `number`."""
        kind = self.kind(number)
        if kind == "garbage":
            return Asked(number, COMPLETIONS, RUBBISH[number % len(RUBBISH)], None, False, at)
        sane = self.prompts.asked(number, at)
        return replace(sane, leave_after=5) if kind == "leaves" else sane


class Ground:
    """The server under load, and prompts for it of which no two are the same."""

    def __init__(self, url: str, pid: int, prose: Prose) -> None:
        self.door, self.pid = Door(Place.of(url), keep_alive=False), pid
        self._prose, self._seed = prose, 0

    def prompts(self) -> Synthetic:
        """Others every time. What the model ends itself is whole."""
        self._seed += 1
        return Synthetic(Manner(ignore_eos=False), self._prose, IN, OUT, seed=self._seed, exact=False)

    async def phase(self, rate: float, seconds: float) -> Phase:
        """Requests of all kinds at `rate` a second for `seconds`, then wait for all of them."""
        found, source = Phase(), Mixed(self.prompts())
        sampling = asyncio.create_task(_sample(self.pid, time.perf_counter(), found))
        run = await open_loop(self.door, source, poisson(rate, 0, seconds=seconds), timeout=STUCK)
        found.seen = [(source.kind(each.number), each) for each in run.seen]
        sampling.cancel()
        return found


async def _sample(pid: int, began: float, found: Phase) -> None:
    while True:
        sizes = await asyncio.to_thread(lambda: [resident(each) for each in tree(pid)])  # `pid` first
        found.memory.append((time.perf_counter() - began, sizes[0], sum(sizes[1:])))
        await asyncio.sleep(5)


async def knee(ground: Ground, seconds: float) -> tuple[float, list[list[str]]]:
    """The rate, and a row for each share that was tried; the first that fails ends it."""
    run = await closed_loop(ground.door, ground.prompts(), 16, requests=96, timeout=STUCK)
    capacity, limits = len(run.seen) / run.seconds, (Limit("ttft", TTFT), Limit("tpot", TPOT))
    rows: list[list[str]] = []

    async def measure(rate: float) -> Figures:
        schedule = poisson(rate, 0, seconds=seconds)
        return figures(await open_loop(ground.door, ground.prompts(), schedule, timeout=STUCK), limits)

    def tell(step: Step) -> None:
        found = step.figures
        rows.append([f"{step.rate:.2f}", f"{step.rate / capacity:.1f}", str(found.requests), f"{found.goodput:.0%}"])
        rows[-1] += [_shown(found.ttft, 1), _shown(found.tpot, 1000)]
        print(rows[-1], flush=True)

    sweep = await climb(measure, [capacity * share for share in SHARES], 0.95, tell=tell)
    return sweep.knee.rate if sweep.knee else capacity * SHARES[0], rows


def _shown(times: Distribution, scale: float) -> str:
    value = times.value("p95")
    return "–" if value is None else f"{scale * value:.{0 if scale > 1 else 2}f}"


def outcomes(found: Phase) -> str:
    """`1 200 whole, 3 refused 429, …` of each kind."""
    kinds: dict[str, Counter[str]] = {}
    for kind, each in found.seen:
        kinds.setdefault(kind, Counter())[ended(each)] += 1
    return "; ".join(f"{kind}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
                     for kind, counts in sorted(kinds.items()))  # fmt: skip


def report(name: str, rate: float, found: Phase) -> list[str]:
    """A row of the table."""
    refused = [each for _, each in found.seen if each.status in (429, 503)]
    told_when = f"{sum(each.retry_after for each in refused)} of {len(refused)}"
    return [name, f"{rate:.2f}", str(len(found.seen)), outcomes(found), f"{found.p95('ttft'):.2f}",
            f"{1000 * found.p95('tpot'):.0f}", found.grown(1), found.grown(2), told_when]  # fmt: skip


async def soak(url: str, pid: int, prose: Prose, minutes: float) -> str:
    """All phases; returns the section."""
    ground = Ground(url, pid, prose)
    rate, sweep = await knee(ground, STEP)
    long = await ground.phase(rate, 60 * minutes)
    print(outcomes(long), flush=True)
    flood = await ground.phase(10 * rate, 60)
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
    prose = Prose.of_ids(Bundle.open(asked.bundle).target_folder("openvino"))
    with server(asked.bundle, asked.port) as (url, pid, _):
        put("soak", asyncio.run(soak(url, pid, prose, asked.minutes)), PAGE)


if __name__ == "__main__":
    main()
