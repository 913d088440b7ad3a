"""When requests are due: drawn in advance from a seed, whatever the server does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from lightship.errors import UsageError

MOST = 1_000_000  # requests of one run


@dataclass(frozen=True)
class Schedule:
    """Times in seconds after the start. The first `warmup` requests are excluded from the figures; `opens` is where the
    measured part begins."""

    times: tuple[float, ...]
    warmup: int
    opens: float


def poisson(
    rate: float,
    seed: int,
    warmup: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    one: bool = False,
) -> Schedule:
    """Arrivals at `rate` a second with exponential gaps: `warmup` first, then at most `count`, for at most `seconds`;
    with `one` until one was due, however late.

    The same seed gives the same times, scaled by the rate. Raises `UsageError` where no end is given, or nothing
    arrives in the time.
    """
    if count is None and seconds is None:
        raise UsageError("an open loop needs a number of requests or seconds")
    times: list[float] = []
    opens = 0.0
    for at in _arrivals(rate, seed):
        if len(times) == warmup:
            opens = times[-1] if times else 0.0  # gaps have no memory: the measured part may begin anywhere
        measured = max(len(times) - warmup, 0)
        past = seconds is not None and len(times) >= warmup + one and at >= opens + seconds
        if measured == count or past or len(times) == MOST:
            break
        times.append(at)
    if len(times) <= warmup:
        raise UsageError(f"at {rate:g} requests a second none is due within {seconds:g} s", hint="give more --seconds")
    return Schedule(tuple(times), warmup, opens)


def _arrivals(rate: float, seed: int) -> Iterator[float]:
    chance, at = random.Random(seed), 0.0  # noqa: S311 (arrivals, not secrets)
    while True:
        at += chance.expovariate(1.0) / rate
        yield at
