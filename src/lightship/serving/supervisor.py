"""Keeps one engine alive: a stuck, dead or overgrown engine process is killed and another one started.

The API process goes on: streams that run when the engine goes raise `EngineDied`, requests of which nothing was sent
yet wait for the next engine (`once_more`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from lightship.draft import total_cache_gb
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError
from lightship.serving import wire
from lightship.serving.placement import Place
from lightship.serving.unchanged import Unchanged
from lightship.serving.worker import Worker

log = logging.getLogger("lightship.serving")
Result = TypeVar("Result")
TOKENLESS = 30  # × stall: steps return and no request gets a token; a prompt may be read for long
LONGEST_PAUSE = 30.0  # seconds before a restart, at most
SLOWER = 10  # × the time of the first load, and `stall` on top: how long loading again may take
MIB = 2**20
PASSING = ("running", "waiting", "cache_usage")  # what an engine's figures say of the moment
SPARE = 2048 * MIB  # for what an engine computes with, and the grammars that it keeps as long as it lives


@dataclass(frozen=True)
class Care:
    """When an engine is replaced, and how often. Seconds and bytes.

    It is stuck when it has work and no step returned for `stall`. After `restarts` within `window` it stays down; the
    pause before them is 0, `backoff`, 2 × `backoff`, …. Above `memory_limit` (None: what it had when loaded, its KV
    cache, and `SPARE`) it is replaced as soon as it is idle; when it is busy for `grace` it gets no new requests, and
    after another `grace` it is not waited for, or sooner: who comes then waits for the next engine, `wait` at most, and
    has half of that for its own prompt. It does not happen more often than `restarts` in `window` either, so that a
    limit which is too low for the model slows it down and does not stop it. Every `interval` it is looked at.
    """

    stall: float = 60.0
    restarts: int = 5
    window: float = 600.0
    backoff: float = 1.0
    memory_limit: int | None = None
    grace: float = 60.0
    wait: float = 60.0
    interval: float = 2.0


@dataclass(frozen=True)
class Memory:
    """Resident memory of the engine process in bytes: now, when it was loaded, and the most that was seen."""

    now: int
    at_ready: int
    peak: int

    def __str__(self) -> str:
        return f"{self.now // MIB} MiB, {self.at_ready // MIB} when loaded, {self.peak // MIB} at most"


@dataclass(frozen=True)
class Trouble:
    """Why an engine is replaced; `planned`: it would have gone on."""

    reason: str
    planned: bool = False


class Watchdog:
    """Tells whether an engine is stuck. Of the time between two looks at most twice the interval counts: when this
    process was itself stopped, or its machine asleep, the engine is not to blame."""

    def __init__(self, stall: float, interval: float) -> None:
        self._stall, self._longest = stall, 2 * interval
        self._looked: float | None = None
        self._seen = (0, 0)
        self._still = [0.0, 0.0]  # seconds without progress, without a token

    def stuck(self, working: bool, progress: int, produced: int, now: float) -> bool:
        """Whether it has work and neither `progress` nor `produced` has grown for too long; `now` in seconds."""
        passed = 0.0 if self._looked is None else min(now - self._looked, self._longest)
        seen = (progress, produced)
        for index in (0, 1):
            unmoved = working and seen[index] == self._seen[index]
            self._still[index] = self._still[index] + passed if unmoved else 0.0
        self._looked, self._seen = now, seen
        return self._still[0] > self._stall or self._still[1] > self._stall * TOKENLESS


class Supervisor:
    """One engine, kept alive: `load`, `start`, then `generate`, as with `Worker`; `close` ends it in whatever state.

    `ready` says whether it takes requests now. `stuck` stays true from the moment it was found stuck until the next one
    is ready. `down`: it was started too often and stays down, for the reason in `failure`.
    """

    def __init__(
        self, target: str, settings: EngineSettings, care: Care | None = None, place: Place | None = None
    ) -> None:
        self.place = place or Place()
        self._target, self._settings = target, self.place.on(settings)
        self.care = care or Care()
        self._interval = min(self.care.interval, self.care.stall / 4)
        self._worker = self._new()
        self._folder: Path | None = None
        self._verified: Unchanged | None = None
        self._asked = self._load_seconds = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._ends: deque[float] = deque()  # when engines ended that should not have
        self._stats: dict[str, Any] = {}
        self._failure: str | None = None
        self.memory: Memory | None = None
        self.restarts = 0
        self.stuck = self.down = False
        self.changed: Callable[[], None] = lambda: None  # called when `ready` or `down` may be other than before

    def _new(self) -> Worker:
        return Worker(self._target, self._settings, self.place.cores)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._worker.ready and not self._worker.draining

    @property
    def live(self) -> bool:
        """What /livez should say: whether an engine works, loads or will be started again."""
        return not self.stuck and not self.down

    @property
    def failure(self) -> str | None:
        """Why there is no engine now, or why there was none before the one that is loading."""
        return self._failure or self._worker.failure

    @property
    def stats(self) -> dict[str, Any]:
        """The engine's latest figures; while there is none, the last ones of the one before, without what went with
        it."""
        found = self._worker.stats or self._stats
        return found if self._worker.ready else {name: value for name, value in found.items() if name not in PASSING}

    @property
    def alive(self) -> bool:
        """Whether there is an engine process."""
        return self._worker.alive

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return self._worker.pid

    def resident(self) -> int | None:
        """Bytes of memory of the engine process; None while none is loaded."""
        return self.memory.now if self.memory and self._worker.ready else None

    def spawn(self) -> None:
        """See `Worker.spawn`."""
        self._worker.spawn()

    def load(self, folder: Path) -> None:
        """See `Worker.load`; engines that follow load the same folder, as long as it holds the same."""
        self._folder, self._asked = folder, time.monotonic()
        draft = self._settings.draft
        self._verified = Unchanged.of([folder, *([Path(draft)] if draft else [])])
        self._worker.load(folder)

    def kill(self) -> None:
        """End an engine process that was spawned and never started."""
        self._worker.kill()

    async def start(self) -> None:
        """Wait until the engine that `load` asked for is loaded. Raises `EngineError` when it cannot be: what does not
        load the first time is not tried again."""
        await self._worker.start()
        if self.down:
            raise EngineDied("the engine was closed while loading")
        self._load_seconds = time.monotonic() - self._asked
        await self._tell()
        self._keeping = asyncio.create_task(self._keep())

    def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """The events of one request, see `Worker.generate`. Raises `EngineDied` when the engine goes, and at once when
        there is none."""
        return self._worker.generate(tokens, params)

    async def recovered(self, timeout: float) -> None:
        """Wait until the engine is ready. Raises `EngineDied` after `timeout` seconds, or when it stays down."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self.ready or self.down)
        except TimeoutError as error:
            raise EngineDied(f"the engine is not back after {timeout:.0f} s") from error
        if not self.ready:
            raise EngineDied(self.failure or "the engine was closed")

    async def close(self) -> None:
        """End the engine process, whatever it is doing, and start no other."""
        self.down = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._worker.close()
        await self._tell()

    async def _tell(self) -> None:
        self.changed()
        async with self._changed:
            self._changed.notify_all()

    # ── Keeping it alive ──────────────────────────────────────────────────

    async def _keep(self) -> None:
        try:
            while not self.down:
                await self._replace(await self._trouble())
                await self._tell()
        except Exception:  # whoever asks must hear that nobody looks after the engine any more
            log.exception("the supervisor of the engine failed")
            self._failure, self.down = "the supervisor of the engine failed", True
            await self._tell()

    async def _trouble(self) -> Trouble:
        """Wait until the engine must be replaced."""
        watchdog, worker = Watchdog(self.care.stall, self._interval), self._worker
        assert self._folder is not None
        caches = total_cache_gb(self._folder, self._settings) * 2**30
        growth = Growth(worker, self.care, int(caches), self._load_seconds)
        self.memory = growth.memory
        while not await worker.ended(self._interval):
            now = time.monotonic()
            if watchdog.stuck(worker.working, worker.progress, worker.produced, now):
                self.stuck = True
                return Trouble("the engine is stuck: it has work and makes no progress")
            trouble = growth.trouble(now)
            self.memory = growth.memory
            if trouble is not None:
                return trouble
        await worker.close()  # which finds out how it ended
        return Trouble(worker.failure or wire.ENDED)

    async def _replace(self, trouble: Trouble | None) -> None:
        """Put another engine in the place of this one, or leave it down after too many attempts."""
        self._stats = self.stats
        while trouble is not None:
            self._failure = trouble.reason
            await self._worker.close()
            pause = 0.0 if trouble.planned else self._pause()
            if pause is None:
                self.down = True
                self._failure = f"the engine stays down, it ended too often; the last time: {self._failure}"
                log.error(self._failure)
                return
            log.log(logging.WARNING if trouble.planned else logging.ERROR, "%s; starting another", self._failure)
            await asyncio.sleep(pause)
            trouble = await self._again()
        self.stuck, self._failure = False, None
        log.warning("the engine is ready again")

    def _pause(self) -> float | None:
        """Seconds to wait before the next start, None when it is one too many."""
        now = time.monotonic()
        self._ends.append(now)
        while self._ends[0] < now - self.care.window:
            self._ends.popleft()
        count = len(self._ends)
        if count > self.care.restarts:
            return None
        return 0.0 if count == 1 else min(self.care.backoff * 2.0 ** (count - 2), LONGEST_PAUSE)

    async def _again(self) -> Trouble | None:
        """Start another engine; what went wrong."""
        assert self._folder is not None and self._verified is not None
        self.restarts += 1
        self._worker = self._new()
        limit = self.care.stall + SLOWER * self._load_seconds
        try:
            self._verified.check()
            self._worker.load(self._folder)
            async with asyncio.timeout(limit):
                await self._worker.start()
        except TimeoutError:
            return Trouble(f"the engine was not loaded after {limit:.0f} s")
        except (EngineError, OSError) as error:  # OSError: no process could be made
            return Trouble(getattr(error, "message", str(error)))
        return None


class Growth:
    """Watches the memory of one engine, whose KV cache may grow to `cache` bytes; `loading` another takes so many
    seconds."""

    def __init__(self, worker: Worker, care: Care, cache: int, loading: float = 0.0) -> None:
        self._worker, self._care, self._cache, self._loading = worker, care, cache, loading
        self._not_before = time.monotonic() + care.window / max(care.restarts, 1)
        self._above_since: float | None = None
        self.memory: Memory | None = None
        self.memory = self._sample()
        if self._limit is None and care.memory_limit is not None:
            log.error("the memory limit of %d MiB is below what the engine needs when loaded (%s): it is not enforced",
                      care.memory_limit // MIB, self.memory)  # fmt: skip

    @property
    def drain(self) -> float:
        """Seconds that an engine may take to get idle once it gets no new requests: those are to see the next one."""
        return max(0.0, min(self._care.grace, self._care.wait / 2 - self._loading))

    @property
    def _limit(self) -> int | None:
        """None where each engine would be above it from the start."""
        if self.memory is None:
            return None
        limit = self._care.memory_limit or self.memory.at_ready + self._cache + SPARE
        return None if self.memory.at_ready > limit else limit

    def _sample(self) -> Memory | None:
        """None when the process is gone."""
        try:
            now = psutil.Process(self._worker.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return self.memory
        before = self.memory or Memory(now, now, now)
        return Memory(now, before.at_ready, max(before.peak, now))

    def trouble(self, now: float) -> Trouble | None:
        """Whether the engine is to be replaced for its memory now. Keeps new requests from one that never gets idle."""
        self.memory = self._sample()
        if self._limit is None or self.memory is None or now < self._not_before:
            return None
        if self.memory.now <= self._limit and not self._worker.draining:
            self._above_since = None
            return None
        if self._above_since is None:
            self._above_since = now
            log.warning("the engine's memory is above %d MiB: %s", self._limit // MIB, self.memory)
        waited = now - self._above_since
        self._worker.draining = waited > self._care.grace
        if self._worker.working and waited <= self._care.grace + self.drain:
            return None
        return Trouble(f"the engine's memory is above {self._limit // MIB} MiB: {self.memory}", planned=True)


class Recovers(Protocol):
    """An engine that may die and come back."""

    async def recovered(self, timeout: float) -> None:
        """See `Supervisor.recovered`."""
        ...


async def once_more(
    attempt: Callable[[], Awaitable[Result]], sent: Callable[[], bool], engine: Recovers, timeout: float
) -> Result:
    """The result of `attempt()`; when the engine dies before anything was `sent` to the client, of a second one.

    `attempt` must start from nothing each time it is called. The next engine is waited for `timeout` seconds at most.
    Raises what the attempt raises, `EngineDied` of the second one included.
    """
    try:
        return await attempt()
    except EngineDied:
        if sent():
            raise
    await engine.recovered(timeout)
    return await attempt()
