"""Another bundle without downtime: its engine is loaded beside the one that serves, shown to be right, and takes over.
Whatever goes wrong before that leaves everything as it was."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lightship.bundle import Bundle
from lightship.draft import TARGET, open_draft, total_cache_gb
from lightship.engine import EngineSettings
from lightship.errors import EngineDied, LightshipError, ReloadFailed, RequestError, UnsupportedError, UsageError
from lightship.machine import memory_available
from lightship.serving.deployment import Maker
from lightship.serving.fallback import attempted
from lightship.serving.front import learn
from lightship.serving.settings import ServeSettings
from lightship.serving.slot import Slot
from lightship.serving.tuned import check_drafted

log = logging.getLogger("lightship.serving")
JSON = dict[str, Any]
LONGEST = 900.0  # seconds of a step
MIB = 2**20
UNMEASURED = 2  # × the size of the runtime folder: what an engine takes whose bundle does not say


class Reloader:
    """One change at a time, of what is in `slot`. `last` says what became of the latest."""

    def __init__(self, slot: Slot, maker: Maker, stopping: Callable[[], bool]) -> None:
        """`stopping` tells that the server will soon end: then nothing new is begun, and what was begun is given up."""
        self._slot, self._maker, self._stopping = slot, maker, stopping
        self._step: str | None = None
        self._steps: list[JSON] = []
        self.last: JSON | None = None

    def described(self) -> JSON:
        """What is served, what will be and what was."""
        slot, past, coming = self._slot, self._slot.past, self._slot.coming
        return {
            "name": self._maker.name,
            "current": slot.current.described(),
            "coming": None if self._step is None else {"step": self._step, **(coming.described() if coming else {})},
            "retiring": [each.described() for each in slot.retiring],
            "previous": None if past is None else {"bundle": past.folder, "digest": past.digest},
            "changes": slot.shifts,
            "last": self.last,
        }

    async def reload(self, folder: str) -> JSON:
        """Serve the bundle in `folder` of this machine. Raises `RequestError` (409) while another change runs, and
        `ReloadFailed` with the step and its reason."""
        return await self._alone(lambda: self._change(folder, None))

    async def rollback(self) -> JSON:
        """Serve the bundle again that was served before; it must be the same as then. Raises as `reload`, and
        `RequestError` (409) when there is none."""
        past = self._slot.past
        if past is None:
            message = "there is no bundle to go back to: none was replaced since this server began"
            raise RequestError(message, code="nothing_to_roll_back", status=409)
        return await self._alone(lambda: self._change(past.folder, past.digest))

    async def _alone(self, change: Callable[[], Coroutine[Any, Any, JSON]]) -> JSON:
        if self._step is not None:
            raise RequestError(f"another change of the bundle is under way ({self._step}); try again when it has ended",
                               code="reload_running", status=409)  # fmt: skip
        if not self._slot.begun:
            raise RequestError("the first bundle is still being loaded", code="loading", status=409)
        self._step, self._steps = "begin", []
        changing = asyncio.create_task(change())
        try:
            while not changing.done() and not self._stopping():
                await asyncio.wait({changing}, timeout=0.1)
            if not changing.done():
                changing.cancel()
                await asyncio.wait({changing})  # it ends the engine that it began
            self.last = await changing
        except asyncio.CancelledError:
            stopped = self._noted(self._failed("the server is stopping"))
            if not changing.done():  # it is this that was cancelled
                changing.cancel()
                raise
            raise stopped from None
        except ReloadFailed as error:
            self._noted(error)
            raise
        finally:
            self._step = None
        return self.last

    def _noted(self, error: ReloadFailed) -> ReloadFailed:
        self.last = {"status": "failed", "reason": error.message}
        log.error(error.message)
        return error

    def _failed(self, why: str) -> ReloadFailed:
        return ReloadFailed(f"{self._step} failed: {why}; {self._slot.current.folder} is served as before")

    @asynccontextmanager
    async def _at(self, step: str) -> AsyncIterator[None]:
        self._step, began = step, time.monotonic()
        try:
            async with asyncio.timeout(LONGEST):
                yield
        except TimeoutError as error:
            raise self._failed(f"it was not done after {LONGEST:.0f} s") from error
        except LightshipError as error:
            raise self._failed(error.message) from error
        except Exception as error:  # whatever it is, the old one goes on and the operator hears of it
            log.exception("unexpected error while changing the bundle")
            raise self._failed(f"{type(error).__name__}: {error}") from error
        before = self._steps.pop()["seconds"] if self._steps and self._steps[-1]["step"] == step else 0.0
        self._steps.append({"step": step, "seconds": round(before + time.monotonic() - began, 3)})

    async def _change(self, folder: str, digest: str | None) -> JSON:
        maker = self._maker
        async with self._at("verify"):
            bundle = await asyncio.to_thread(self._verified, folder, digest)
            chosen = maker.chosen(bundle)
        before = len(self._steps)

        async def attempt(settings: ServeSettings) -> JSON:
            del self._steps[before:]
            async with self._at("verify"):
                await asyncio.to_thread(check_same_draft, settings, bundle)
            async with self._at("memory"):
                check_memory(bundle, settings.target, len(maker.places), settings.engine, settings.draft)
            return await self._take_over(bundle, settings)

        return await attempted(chosen, maker.defaults, bundle.folder, attempt, self._stopping)

    async def _take_over(self, bundle: Bundle, chosen: ServeSettings) -> JSON:
        """Load `bundle` beside what is served, try it, and serve it."""
        slot, maker, handed = self._slot, self._maker, False
        target = chosen.target or bundle.targets[0]
        engine = maker.engine(target, chosen) if bundle.kind == "decoder" else None
        try:
            async with self._at("load"):
                if engine is not None:
                    engine.load(bundle.target_folder(target))  # here: a child ends with its parent's thread
                kind = await asyncio.to_thread(maker.kind, bundle, engine, chosen)
                slot.coming = new = maker.deployment(kind)
                handed = True
                await new.engine.start()
                learn(new.admission, new.engine.stats)
            async with self._at("warm up"):
                await kind.warm()
            async with self._at("golden"):
                found = await kind.replay()
                found.check()
            async with self._at("shift"):
                if not new.engine.ready:
                    raise EngineDied(new.engine.failure or "the new engine is not ready")
                slot.shift(new)
        finally:
            if (given_up := slot.coming) is not None:
                slot.coming = None
                await given_up.close()
            elif engine is not None and not handed:
                await engine.close()
        log.warning("now serving %s (%s), golden: %s %.3g", bundle.folder, bundle.digest[:12], found.what, found.mean)
        assert slot.past is not None
        return {
            "status": "serving", "name": maker.name, "bundle": str(bundle.folder), "digest": bundle.digest,
            "previous": {"bundle": slot.past.folder, "digest": slot.past.digest}, "steps": self._steps,
            "golden": {"what": found.what, "mean": found.mean, "stderr": found.stderr, "n": len(found.values),
                       "limit": found.limit},
            **({"tuned_ignored": dict(chosen.tuned_ignored)} if chosen.tuned_ignored else {}),
        }  # fmt: skip

    def _verified(self, folder: str, digest: str | None) -> Bundle:
        path = Path(folder)
        if "://" in folder or not path.is_absolute():
            raise UsageError(f"{folder[:100]!r} is no absolute path of a folder on the server's machine")
        bundle = Bundle.open(path.resolve())  # what a link names later is another bundle
        if digest is not None and bundle.digest != digest:
            raise UsageError(f"{folder} holds another bundle than the one that was served before")
        served = self._slot.current.bundle.kind
        if bundle.kind != served:
            raise UnsupportedError(f"{bundle.name!r} is of the kind {bundle.kind}, and {served} is served here: its "
                                   "clients ask other routes")  # fmt: skip
        return bundle


def check_same_draft(chosen: ServeSettings, bundle: Bundle) -> None:
    """Raise `LightshipError` unless the draft, where one is used, is still what it was when the server began, and can
    propose to `bundle`."""
    if chosen.draft is None or chosen.engine.draft is None:
        return
    if open_draft(chosen.draft.folder).digest != chosen.draft.digest:
        raise UsageError(f"{chosen.draft.folder} holds another draft than when the server began",
                         hint="start the server again")  # fmt: skip
    check_drafted(chosen, bundle)


def check_memory(
    bundle: Bundle, target: str | None, engines: int, settings: EngineSettings, draft: Bundle | None = None
) -> None:
    """Raise `UsageError` when another `engines` of `bundle` probably have no room beside what runs: each takes what was
    measured of its `target` (None: the first) when the bundle was made, and its KV cache; and as much of the `draft`,
    where `settings` name it."""
    target = target or bundle.targets[0]
    each = _measured(bundle, target)
    if bundle.kind == "decoder":
        each += total_cache_gb(bundle.target_folder(target), settings) * 2**30
    if draft is not None and settings.draft is not None:
        each += _measured(draft, TARGET)
    needed, available = engines * each, memory_available()
    if needed > available:
        raise UsageError(f"old and new are in memory together: the new one takes about {needed / MIB:.0f} MiB, "
                         f"{available / MIB:.0f} MiB are available")  # fmt: skip


def _measured(bundle: Bundle, target: str) -> float:
    """Bytes that an engine of `target` took, or probably takes."""
    report = bundle.measured(target)
    if (measured := report.get("peak_pss") or report.get("peak_rss")) is not None:
        return float(measured.value)
    files, inside = bundle.manifest["files"].items(), f"targets/{target}/"
    return UNMEASURED * float(sum(entry["size"] for name, entry in files if name.startswith(inside)))
