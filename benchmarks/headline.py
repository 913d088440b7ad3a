"""The highest rate of requests at which nearly all meet their limits, through the server and on the bare pipeline.

A random llama of 1.24 B parameters, 1 500 tokens in, of which 1 000 are the same in all, 100 out; open loop, arrivals
by a Poisson process, latency from when a request was due. Rates are 5 % apart, and both arms get the same arrivals and
prompts at a rate. A rate holds when 90 % of the requests meet both limits; the knee is the highest that holds below all
that do not. Which requests fall together is chance, so that a rate may hold or fail by luck: with `--rounds` each rate
gets so many schedules, whose requests are counted together; given rates are measured once each before any twice.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import models
from benchmarks.arms import ISAS, Arms, arithmetic, masked, pieces, tokens_of, tuned
from benchmarks.load import Load, Run
from benchmarks.page import put, section, spread, table
from lightship.bench.schedule import poisson
from lightship.bundle import Bundle
from lightship.engine import EngineSettings

SHARED, OWN, OUT = 1000, 500, 100  # tokens
SHARE = 0.9  # of the requests must meet both limits
STEP = 1.05  # between two rates
LOOSE = ("--accept", "kld<=100")  # random weights: how exact they are does not matter here


Pair = tuple[Run, Run]  # through the server, and on the bare pipeline


class Ground:
    """A bundle, and what was found at each rate, in rounds: place p on the scale is `STEP`^p requests a second."""

    def __init__(
        self, bundle: Bundle, count: int, rounds: int, ttft: float, tpot: float, port: int,
        settings: EngineSettings | None,
    ) -> None:  # fmt: skip
        self.bundle, self.count, self.rounds, self.ttft, self.tpot = bundle, count, rounds, ttft, tpot
        self._port, self._settings = port, settings
        self._ids = tokens_of(bundle)
        self.tried: dict[int, list[Pair]] = {}

    def measure(self, place: int, rounds: int) -> None:
        """Both arms at that rate, until it was measured so often."""
        found = self.tried.setdefault(place, [])
        while len(found) < rounds:
            found.append(self._measure(place, seed=len(found) + 1))

    def holds(self, arm: int, place: int) -> bool:
        """Whether enough requests of that arm keep the limits at that rate, in all rounds together."""
        self.measure(place, self.rounds)
        return self._all(place)[arm].within(self.ttft, self.tpot) >= SHARE

    def _all(self, place: int) -> Pair:
        served, bare = zip(*self.tried[place], strict=True)
        return Run.joined(served), Run.joined(bare)

    def knee(self, arm: int) -> int | None:
        """The highest place that held below all that did not; None when none held."""
        broken = min((place for place in self.tried if not self.holds(arm, place)), default=sys.maxsize)
        return max((place for place in self.tried if self.holds(arm, place) and place < broken), default=None)

    def search(self, arm: int, start: int, stride: int = 4, lowest: int = -80) -> None:
        """Strides from `start` until it holds on one side and not on the other, then halves of the gap."""
        low = high = start
        if self.holds(arm, start):
            while self.holds(arm, high := low + stride):
                low = high
        else:
            while high > lowest and not self.holds(arm, low := high - stride):
                high = low
        while high - low > 1 and high > lowest:
            middle = (low + high) // 2
            low, high = (middle, high) if self.holds(arm, middle) else (low, middle)

    def _measure(self, place: int, seed: int) -> Pair:
        with tempfile.TemporaryDirectory() as name:
            arms = Arms(self.bundle, Path(name), self._load(place, seed), self._settings)
            self._port += 1
            served = arms.served(self._port).run
            pair = served, arms.in_process(served)
        for title, run in zip(("served", "bare"), pair, strict=True):
            missed = {each: [run.ttft[each], run.tpot[each]] for each in run.missed(self.ttft, self.tpot)}
            print(self.bundle.folder.name, title, *self._row(place, run), missed, file=sys.stderr, flush=True)
        return pair

    def _load(self, place: int, seed: int) -> Load:
        """Three requests first, one after the other, then the schedule. No place has the prompts of another."""
        own = pieces(self._ids[SHARED + 7 * (place % 50) + seed :], OWN, self.count + 3)
        rows = [self._ids[:SHARED] + row for row in own]
        times = poisson(STEP**place, seed=seed, count=self.count).times
        return Load(rows[:3], rows[3:], OUT, times=list(times), counted=True)  # most ids of this model are no token

    def _row(self, place: int, run: Run) -> list[str]:
        return [f"{STEP**place:.3f}", f"{run.within(self.ttft, self.tpot):.0%}", f"{run.high('ttft'):.2f}",
                f"{1000 * run.high('tpot'):.0f}"]  # fmt: skip

    def rows(self) -> list[list[str]]:
        """A row for each rate that was tried."""
        return [[f"{self.bundle.folder.name}, {STEP**place:.3f}",
                 *(cell for run in self._all(place) for cell in self._row(place, run)[1:])]
                for place in sorted(self.tried)]  # fmt: skip

    def said(self) -> str:
        """The knees, and the means of all requests, which chance moves less."""
        served, bare = self.knee(0), self.knee(1)
        found = "no rate that was tried held in both arms"
        if served is not None and bare is not None:
            found = (
                f"{STEP**served:.3f} served, {STEP**bare:.3f} on the bare pipeline, ratio {STEP ** (served - bare):.2f}"
            )
        pairs = [pair for tried in self.tried.values() for pair in tried]
        means = (spread([ours.mean(name) / theirs.mean(name) for ours, theirs in pairs]) for name in ("ttft", "tpot"))
        return (f"{self.bundle.folder.name}: {found}; means of a run, served / bare: TTFT {next(means)}, TPOT "
                f"{next(means)}, {len(pairs)} pairs of runs")  # fmt: skip


def made(folder: Path, precision: str, arithmetic: str = "auto") -> Bundle:
    """The bundle of the random llama in `folder`, shipped if it is not there."""
    out = folder / (f"llama-{precision}" + f"-{arithmetic}" * (arithmetic != "auto"))
    if not out.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            demo = models.demo(Path(name) / "demo")
            source = models.random_llama(Path(name) / "llama", demo.folder).folder
            command = [sys.executable, "-m", "lightship", "ship", str(source), "-p", precision, "-o", str(out)]
            command += ["--arithmetic", arithmetic, *LOOSE]
            subprocess.run(command, check=True)
    return Bundle.open(out)


def main() -> None:
    """Both precisions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bundles"), help="where the bundles are, or are made")
    parser.add_argument("--precision", nargs="+", choices=["int8", "bf16"], default=["int8", "bf16"])
    parser.add_argument("--requests", type=int, default=30, help="at each rate, in each round")
    parser.add_argument("--rounds", type=int, default=1, help="of each rate, each with arrivals of its own")
    parser.add_argument("--start", type=float, default=0.3, help="requests a second to begin at")
    parser.add_argument("--rates", type=float, nargs="+", help="just these, to the next 5 %%, instead of a search")
    parser.add_argument("--ttft", type=float, default=3.0, help="seconds")
    parser.add_argument("--tpot", type=float, default=0.25, help="seconds")
    parser.add_argument("--tuned", action="store_true", help="with what `lightship tune` found for the bundles")
    parser.add_argument("--isa", choices=ISAS, help="the newest instructions that oneDNN may use")
    parser.add_argument("--port", type=int, default=19_100)
    asked = parser.parse_args()
    name = section("headline" + " --tuned" * asked.tuned + masked(asked.isa))
    rows = [["bundle, requests/s", "served within limits", "TTFT p90, s", "TPOT p90, ms", "bare within limits",
             "TTFT p90, s", "TPOT p90, ms"]]  # fmt: skip
    said = []
    for place, precision in enumerate(asked.precision):
        bundle = made(asked.folder, precision, arithmetic(asked.isa))
        settings, engine = tuned(bundle) if asked.tuned else (None, "untuned")
        port = asked.port + 100 * place
        ground = Ground(bundle, asked.requests, asked.rounds, asked.ttft, asked.tpot, port, settings)
        for count in range(1, asked.rounds + 1):
            for rate in asked.rates or ():
                ground.measure(round(math.log(rate, STEP)), count)
        for arm in (0, 1) if not asked.rates else ():
            ground.search(arm, round(math.log(asked.start, STEP)))
        rows += ground.rows()
        said.append(f"{ground.said()} ({engine})")
    put(
        name,
        f"{table(rows)}\n\n{asked.rounds * asked.requests} requests at each rate; limits TTFT ≤ {asked.ttft:g} s, "
        f"TPOT ≤ {1000 * asked.tpot:.0f} ms for {SHARE:.0%} of them. Highest rate that held, requests/s: "
        f"{'; '.join(said)}.",
    )


if __name__ == "__main__":
    main()
