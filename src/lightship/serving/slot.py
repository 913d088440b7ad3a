"""The place of the deployment that is served now. A request goes to the one that is there when it comes, and stays with
it to its end; so a change of bundle is one assignment, and no request sees both."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lightship.serving.admission import Snapshot
from lightship.serving.deployment import Deployment
from lightship.serving.fleet import Fleet

log = logging.getLogger("lightship.serving")
RETIRING = 600.0  # seconds that the requests of a replaced deployment may take


@dataclass(frozen=True)
class Past:
    """The bundle that was served before: where it lies, and what it was."""

    folder: str
    digest: str


class Slot:
    """Serves `current`, as one engine (`app.Served`); `coming` is being made ready, `retiring` still have requests."""

    current: Deployment  # is put there before anything is asked

    def __init__(self) -> None:
        self.begun = False  # whether the first bundle was loaded
        self.begin: Callable[[], Awaitable[None]] = lambda: self.current.engine.start()  # loads it
        self.coming: Deployment | None = None
        self.retiring: set[Deployment] = set()
        self.past: Past | None = None
        self.shifts = 0
        self._ending: set[asyncio.Task[None]] = set()
        self._restarts = 0  # of those that are gone

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        deployment = self.current
        deployment.inside += 1
        try:
            await deployment.routes(scope, receive, send)
        finally:
            deployment.inside -= 1

    def shift(self, new: Deployment) -> None:
        """Serve `new`, which is ready, from the next request on; the old one ends when its requests have."""
        old, self.current, self.coming = self.current, new, None
        self.past = Past(old.folder, old.bundle.digest)
        self.shifts += 1
        self.retiring.add(old)
        task = asyncio.create_task(self._retire(old))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _retire(self, old: Deployment) -> None:
        latest = time.monotonic() + RETIRING
        while old.inside and time.monotonic() < latest:
            await asyncio.sleep(0.05)
        if old.inside:
            log.warning("%d requests of the bundle before are cut off after %.0f s", old.inside, RETIRING)
        await self._end(old)
        log.warning("the engine of %s has ended", old.folder)

    async def replace(self, new: Deployment) -> None:
        """Put `new`, of which nothing is loaded yet, in the place of what could not be loaded, and end that."""
        old, self.current = self.current, new
        self.retiring.add(old)  # so that `close` ends it if this is cancelled
        await self._end(old)

    async def _end(self, old: Deployment) -> None:
        await old.close()
        self._restarts += old.engine.restarts
        self.retiring.discard(old)

    # ── As one engine ───────────────────────────────────────────────────────

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.begun and self.current.engine.ready

    @property
    def live(self) -> bool:
        """Whether an engine works, loads or will be started again."""
        return self.current.engine.live

    @property
    def failure(self) -> str | None:
        """Why there is no engine now."""
        return self.current.engine.failure

    @property
    def stats(self) -> Mapping[str, Any]:
        """Of the current engine."""
        return self.current.engine.stats

    @property
    def restarts(self) -> int:
        """Of all engines there were."""
        return self._restarts + sum(each.engine.restarts for each in self._serving())

    def resident(self) -> int | None:
        """Bytes of memory of all engine processes."""
        every = [*self._serving(), *([self.coming] if self.coming else [])]
        sizes = [size for each in every if (size := each.engine.resident()) is not None]
        return sum(sizes) if sizes else None

    def engines(self) -> tuple[int, int]:
        """How many engines the current deployment has, and how many of them are ready."""
        engine = self.current.engine
        if isinstance(engine, Fleet):
            return len(engine.engines), sum(each.ready for each in engine.engines)
        return 1, int(engine.ready)

    def snapshot(self) -> Snapshot:
        """What runs and waits in all deployments; the size of the pool and the speeds are the current one's."""
        now, waiting = self.current.admission.snapshot(), dict[str, int]()
        every = [now, *(each.admission.snapshot() for each in self.retiring)]
        for each in every:
            for key, count in each.waiting_by_key.items():
                waiting[key] = waiting.get(key, 0) + count
        return Snapshot(sum(each.running for each in every), sum(each.sequences for each in every),
                        sum(each.waiting for each in every), waiting, now.blocks,
                        sum(each.blocks_used for each in every), now.prefill_speed, now.decode_speed)  # fmt: skip

    def _serving(self) -> list[Deployment]:
        return [self.current, *self.retiring]

    async def start(self) -> None:
        """Load the first bundle."""
        await self.begin()
        self.begun = True

    async def close(self) -> None:
        """End all processes."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        every = [*self._serving(), *([self.coming] if self.coming else [])]
        await asyncio.gather(*(each.close() for each in every))


class Switch:
    """ASGI middleware, the innermost: requests go to the slot, the rest (the life of the server) to the app."""

    def __init__(self, app: ASGIApp, slot: Slot) -> None:
        self._app, self._slot = app, slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        await (self._slot.serve if scope["type"] == "http" else self._app)(scope, receive, send)
