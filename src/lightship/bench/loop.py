"""The two loops: open, where requests come by a schedule whatever the server does, and closed, with N clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from lightship.bench.client import Clock, Seen, ask
from lightship.bench.prompts import Source
from lightship.bench.schedule import Schedule
from lightship.bench.wire import Door

TIMEOUT = 600.0  # seconds for one request
Cut = Callable[["Run"], None]  # gets what a loop had measured when it was cancelled


class Watch(Protocol):
    """Who is told while a run goes on."""

    def begin(self, name: str, requests: int | None, seconds: float | None) -> None:
        """A run, or its warm-up, begins; with how many requests and seconds, as far as that is known."""

    def sent(self) -> None:
        """A request is sent."""

    def seen(self, seen: Seen) -> None:
        """A request has ended."""


class Nobody:
    """A watch that looks away."""

    def begin(self, name: str, requests: int | None, seconds: float | None) -> None: ...
    def sent(self) -> None: ...
    def seen(self, seen: Seen) -> None: ...


@dataclass(frozen=True)
class Run:
    """What was measured, the warm-up left out. `seconds`: from the begin of the measured part to its last answer."""

    seen: tuple[Seen, ...]
    seconds: float
    rate: float | None = None  # requests a second that were scheduled; None: a closed loop
    clients: int | None = None


def _clock() -> Clock:
    now = asyncio.get_running_loop().time  # what sleeps and time-outs go by as well
    began = now()
    return lambda: now() - began


async def open_loop(
    door: Door,
    source: Source,
    schedule: Schedule,
    watch: Watch | None = None,
    timeout: float = TIMEOUT,
    cut: Cut = lambda run: None,
) -> Run:
    """Send request i of `source` at `schedule.times[i]`, then wait for all answers."""
    watch = watch or Nobody()
    requests = [source.asked(number, at) for number, at in enumerate(schedule.times)]
    measured = schedule.times[schedule.warmup :]
    watch.begin("open loop", len(requests), schedule.times[-1])
    span = measured[-1] - schedule.opens
    rate = len(measured) / span if span > 0 else None
    clock, tasks, found = _clock(), [], list[Seen]()

    async def one(number: int) -> None:
        watch.sent()
        seen = await ask(door, requests[number], clock, schedule.times[number], timeout)
        watch.seen(seen)
        found.append(seen)

    def run() -> Run:
        kept = tuple(sorted((each for each in found if each.number >= schedule.warmup), key=_number))
        return Run(kept, max((each.ended for each in kept), default=schedule.opens) - schedule.opens, rate)

    try:
        for number, at in enumerate(schedule.times):
            if (wait := at - clock()) > 0:
                await asyncio.sleep(wait)
            elif number % 16 == 0:
                await asyncio.sleep(0)  # late already: what was started must still get its turn
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        cut(run())
        raise
    finally:
        for task in tasks:
            task.cancel()
    return run()


async def closed_loop(
    door: Door,
    source: Source,
    clients: int,
    requests: int | None = None,
    seconds: float | None = None,
    warmup: int = 0,
    watch: Watch | None = None,
    timeout: float = TIMEOUT,
    cut: Cut = lambda run: None,
) -> Run:
    """`clients` at a time send the next request as soon as their last one was answered, until `requests` or `seconds`
    are used up or the source is empty; what runs then is waited for. `warmup` requests run to their end before."""
    watch = watch or Nobody()
    numbers = iter(range(source.count)) if source.count is not None else count()
    if warmup:
        watch.begin("warm-up", warmup, None)
        await _round(door, source, _first(numbers, warmup), clients, watch, timeout, None, [])
    watch.begin("closed loop", requests, seconds)
    found: list[Seen] = []

    def run() -> Run:
        return Run(tuple(sorted(found, key=_number)), max((each.ended for each in found), default=0.0), clients=clients)

    try:
        await _round(door, source, _first(numbers, requests), clients, watch, timeout, seconds, found)
    except asyncio.CancelledError:
        cut(run())
        raise
    return run()


def _number(seen: Seen) -> int:
    return seen.number


def _first(numbers: Iterator[int], most: int | None) -> Iterator[int]:
    """At most `most` of them; unlike `islice`, an end that is not reached takes nothing more."""
    taken = 0
    while most is None or taken < most:
        taken += 1
        try:
            yield next(numbers)
        except StopIteration:
            return


async def _round(
    door: Door,
    source: Source,
    numbers: Iterator[int],
    clients: int,
    watch: Watch,
    timeout: float,
    seconds: float | None,
    found: list[Seen],
) -> None:
    clock: Callable[[], float] = _clock()

    async def client() -> None:
        for number in numbers:
            asked = source.asked(number)
            if seconds is not None and clock() >= seconds:
                return
            watch.sent()
            seen = await ask(door, asked, clock, clock(), timeout)
            watch.seen(seen)
            found.append(seen)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
