"""Tuned settings that a bundle cannot be served with: the defaults instead, and one warning.

The file of tuned settings is not signed, and may ask for what this runtime refuses or dies of. Whether it does is
known only when an engine in its process, with these settings, was loaded and has answered; so what has another try is a
whole deployment, whatever went wrong. A fault that the defaults have too is theirs: it is raised as if nothing had been
tuned.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lightship import tuning
from lightship.errors import EngineError, LightshipError, ReloadFailed
from lightship.serving.deployment import Maker
from lightship.serving.settings import ServeSettings
from lightship.serving.slot import Slot
from lightship.serving.tuned import check_drafted

log = logging.getLogger("lightship.serving")
Result = TypeVar("Result")
LONGEST = 900.0  # seconds that tuned settings may take to load
REASON = 300  # characters that are told of it


async def attempted(
    chosen: ServeSettings,
    defaults: ServeSettings,
    folder: Path,
    attempt: Callable[[ServeSettings], Awaitable[Result]],
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """`attempt(chosen)`; where something was tuned for the bundle in `folder` and that fails, `attempt` with the
    `defaults`, which then say what was ignored and why. A server that is `stopping` begins nothing anew."""
    if chosen.tuned is None:
        return await attempt(chosen)
    try:
        return await attempt(chosen)
    except LightshipError as error:
        if stopping():
            raise
        reason = _reason(error)[:REASON]
    file = tuning.place(folder)
    found = await attempt(replace(defaults, tuned_ignored={"file": file.name, "reason": reason}))
    log.warning("the settings in %s (%s) cannot be used: %s; serving with the defaults. Run `lightship tune` again, or "
                "remove the file", file, tuning.label(chosen.tuned.target, chosen.tuned.settings), reason)  # fmt: skip
    return found


def _reason(error: LightshipError) -> str:
    """What went wrong, without the step at which a change was."""
    cause = error.__cause__ if isinstance(error, ReloadFailed) else error
    if isinstance(cause, LightshipError):
        return cause.message
    said = "" if cause is None else str(cause)
    return f"{type(cause).__name__}: {said}" if said else error.message  # a `TimeoutError` says nothing


async def begin(slot: Slot, maker: Maker, chosen: ServeSettings) -> None:
    """Load the first bundle, which is in `slot` and was made with the settings `chosen` for it. Raises `EngineError`
    when it cannot be."""
    bundle = slot.current.bundle

    async def attempt(settings: ServeSettings) -> None:
        if chosen.tuned is None:
            await slot.current.engine.start()
            return
        await asyncio.to_thread(check_drafted, settings, bundle)
        if settings is not chosen:
            target = settings.target or bundle.targets[0]
            engine = maker.engine(target, settings)
            await slot.replace(maker.deployment(await asyncio.to_thread(maker.kind, bundle, engine, settings)))
            engine.load(bundle.target_folder(target))  # only now: whatever ends this ends it too
        try:
            async with asyncio.timeout(LONGEST if settings.tuned else None):
                await slot.current.engine.start()
                await slot.current.kind.warm()  # an engine may load and then die of its first prompt
        except TimeoutError as error:
            raise EngineError(f"it was not loaded after {LONGEST:.0f} s") from error

    await attempted(chosen, maker.defaults, bundle.folder, attempt, lambda: maker.front.door.closing)
