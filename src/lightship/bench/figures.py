"""What is computed from the requests: percentiles where n allows them, throughput, goodput under limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightship.bench.client import Seen
from lightship.bench.loop import Run
from lightship.errors import UsageError

PERCENTILES = (50, 90, 95, 99)
NAMES = ("ttft", "tpot", "e2e")
LATE = 0.1  # share of the median TTFT from which the generator's own delay is worth a warning

FORMULAS = (
    "Times count from when a request was due (open loop: the schedule; closed loop: when its client was free).",
    "dispatch delay = sent − due: how late the generator itself was; it is part of TTFT and end-to-end",
    "TTFT = first text − due",
    "TPOT = (last − first) / (tokens − 1)",
    "end-to-end = end of the stream − due",
    "tokens/s = tokens of answers that ended / (last end − begin of the measured part)",
    "goodput = requests that ended and met every limit / all requests, and per second",
    "TTFT and TPOT: of answers that ended as asked or that the model ended itself; end-to-end: only of those as long "
    "as asked. Refused, failed, broken and short ones have no times, and miss every limit.",
    "Percentiles: linear between ranks, p50 from n = 2, p90 from 10, p95 from 20, p99 from 100; in brackets the 95 % "
    "interval from order statistics, – where n is too small for it.",
)


@dataclass(frozen=True)
class Limit:
    """`name` (ttft, tpot or e2e) of a request may be at most `seconds`."""

    name: str
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`ttft=3`, `tpot=0.25s` or `tpot=250ms`. Raises `UsageError`."""
        name, _, value = text.strip().lower().partition("=")
        digits, scale = (value[:-2], 1e-3) if value.endswith("ms") else (value.removesuffix("s"), 1.0)
        try:
            seconds = float(digits) * scale
        except ValueError:
            seconds = math.nan
        if name not in NAMES or not 0 < seconds < math.inf:
            raise UsageError(f"{text!r} is no limit", hint="give ttft=3, tpot=0.25 or e2e=20: seconds, or tpot=250ms")
        return cls(name, seconds)

    def met(self, seen: Seen) -> bool:
        """Whether a request met it. An answer of one token has no time between tokens; one that is shorter than asked
        must not pass for that."""
        value: float | None = getattr(seen, self.name)
        if value is None:
            return self.name == "tpot" and seen.outcome == "whole" and seen.tokens == 1
        return value <= self.seconds

    def __str__(self) -> str:
        return f"{self.name} ≤ {self.seconds:g} s"


def within(seen: Seen, limits: Sequence[Limit]) -> bool:
    """Whether a request was answered and met every limit."""
    return seen.answered and all(limit.met(seen) for limit in limits)


@dataclass(frozen=True)
class Quantile:
    """A percentile with its 95 % interval; None where n is too small for that side."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Distribution:
    """n values, seconds. A percentile is None where n does not allow it."""

    n: int
    mean: float | None
    quantiles: dict[str, Quantile | None]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Of the values of some requests."""
        ordered = np.sort(np.asarray(values, float))
        quantiles = {f"p{percent}": _quantile(ordered, percent) for percent in PERCENTILES}
        return cls(len(ordered), float(ordered.mean()) if len(ordered) else None, quantiles)

    def value(self, name: str) -> float | None:
        """A percentile, such as `p50`, or None."""
        found = self.quantiles[name]
        return None if found is None else found.value


def needed(percent: int) -> int:
    """How many values a percentile takes, so that at least one lies beyond it: p99 100, p95 20, p90 10, p50 2."""
    return math.ceil(100 / (100 - percent))


def _quantile(ordered: Any, percent: int) -> Quantile | None:
    n = len(ordered)
    if n < needed(percent):
        return None
    low, high = ranks(n, percent / 100)
    bound = [None if rank is None else float(ordered[rank - 1]) for rank in (low, high)]
    return Quantile(float(np.percentile(ordered, percent)), *bound)


def ranks(n: int, share: float, confidence: float = 0.95) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the sorted values between which the quantile lies, at least with `confidence`, whatever the
    distribution: the number of values below it is binomial (n, share). None: no rank is far enough out."""
    tail = (1 - confidence) / 2
    constant = math.lgamma(n + 1)
    below, low, high = 0.0, None, None
    for hits in range(n + 1):
        log = constant - math.lgamma(hits + 1) - math.lgamma(n - hits + 1)
        below += math.exp(log + hits * math.log(share) + (n - hits) * math.log1p(-share))
        if below <= tail:
            low = hits + 1  # P(fewer than hits + 1 below the quantile) is small
        if below >= 1 - tail:
            high = hits + 1
            break
    return low, high if high is not None and high <= n else None


@dataclass(frozen=True)
class Figures:
    """Of one run. `outcomes`: how many requests ended how. `missed`: how many missed which limit, `failures` those that
    did not end as an answer. `counted`: where the tokens come from, usage or pieces. `notes`: what was found out about
    the server before."""

    requests: int
    outcomes: dict[str, int]
    seconds: float
    rate: float | None
    clients: int | None
    counted: str
    input_tokens: int | None
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    ttft: Distribution
    tpot: Distribution
    e2e: Distribution
    delay: Distribution
    limits: tuple[str, ...]
    good: int
    missed: dict[str, int]
    retry_after: int
    reasons: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def goodput(self) -> float:
        """Share of all requests that met every limit."""
        return self.good / self.requests if self.requests else 0.0

    @property
    def good_per_second(self) -> float:
        """Requests a second that met every limit."""
        return self.good / self.seconds if self.seconds else 0.0

    @property
    def answered(self) -> int:
        """Requests whose times count."""
        return self.outcomes.get("whole", 0) + self.outcomes.get("stopped", 0)

    def late(self) -> bool:
        """Whether the generator's own delay is a large part of what it measured."""
        first = self.ttft.value("p50")
        delay = self.delay.value("p99") or self.delay.value("p90")
        return first is not None and delay is not None and delay > LATE * first

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "goodput": self.goodput, "good_per_second": self.good_per_second}


def figures(run: Run, limits: Sequence[Limit] = (), notes: tuple[str, ...] = ()) -> Figures:
    """Compute all figures of a run. Raises `UsageError` where it has no request."""
    if not run.seen:
        raise UsageError("no request was measured", hint="give more --requests or --seconds")
    answered = [each for each in run.seen if each.answered]
    tokens = sum(each.tokens for each in answered)
    prompts = [each.prompt_tokens for each in answered if each.prompt_tokens is not None]
    missed = {limit.name: sum(not limit.met(each) for each in answered) for limit in limits}
    missed["failures"] = len(run.seen) - len(answered)
    return Figures(
        requests=len(run.seen),
        outcomes=dict(Counter(each.outcome for each in run.seen)),
        seconds=run.seconds,
        rate=run.rate,
        clients=run.clients,
        counted="usage" if all(each.counted == "usage" for each in answered) else "pieces",
        input_tokens=sum(prompts) if prompts else None,
        output_tokens=tokens,
        tokens_per_second=tokens / run.seconds if run.seconds else 0.0,
        requests_per_second=len(answered) / run.seconds if run.seconds else 0.0,
        ttft=_times(answered, "ttft"),
        tpot=_times(answered, "tpot"),
        e2e=_times(answered, "e2e"),
        delay=_times(run.seen, "delay"),
        limits=tuple(map(str, limits)),
        good=sum(within(each, limits) for each in run.seen),
        missed=missed,
        retry_after=sum(each.retry_after for each in run.seen if each.outcome == "refused"),
        reasons=dict(Counter(each.reason for each in run.seen if each.reason is not None).most_common(5)),
        notes=notes,
    )


def _times(seen: Sequence[Seen], name: str) -> Distribution:
    return Distribution.of([value for each in seen if (value := getattr(each, name)) is not None])
