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

log = logging.getLogger("lightship.serving")
Result = TypeVar("Result")
LONGEST = 900.0  # seconds that tuned settings may take to load
REASON = 300  # characters that are told of it


async def attempted(
    chosen: ServeSettings,
    defaults: ServeSettings,
    folder: Path,
    attempt: Callable[[ServeSettings], Awaitable[Result]],
) -> Result:
    """`attempt(chosen)`; where something was tuned for the bundle in `folder` and that fails, `attempt` with the
    `defaults`, which then say what was ignored and why."""
    if chosen.tuned is None:
        return await attempt(chosen)
    try:
        return await attempt(chosen)
    except LightshipError as error:
        cause = error.__cause__ if isinstance(error, ReloadFailed) else error
        reason = (getattr(cause, "message", None) or f"{type(cause).__name__}: {cause}")[:REASON]
    file = tuning.place(folder)
    found = await attempt(replace(defaults, tuned_ignored={"file": file.name, "reason": reason}))
    log.warning("the settings in %s (%s) cannot be used: %s; serving with the defaults. Run `lightship tune` again, or "
                "remove the file", file, tuning.label(chosen.tuned.target, chosen.tuned.settings), reason)  # fmt: skip
    return found


async def begin(slot: Slot, maker: Maker, chosen: ServeSettings) -> None:
    """Load the first bundle, which is in `slot` and was made with the settings `chosen` for it. Raises `EngineError`
    when it cannot be."""
    bundle = slot.current.bundle

    async def attempt(settings: ServeSettings) -> None:
        if settings is not chosen:
            await slot.current.close()
            engine = maker.engine(settings.target or bundle.targets[0], settings)
            engine.load(bundle.target_folder(settings.target or bundle.targets[0]))
            slot.current = maker.deployment(await asyncio.to_thread(maker.kind, bundle, engine, settings))
        if settings.tuned is None:
            await slot.current.engine.start()
            return
        try:
            async with asyncio.timeout(LONGEST):
                await slot.current.engine.start()
                await slot.current.kind.warm()  # an engine may load and then die of its first prompt
        except TimeoutError as error:
            raise EngineError(f"it was not loaded after {LONGEST:.0f} s") from error

    await attempted(chosen, maker.settings, bundle.folder, attempt)
