"""A supervised `FakeEngine`, and what its faults are."""

import asyncio
import contextlib
import json

from lightship.engine import EngineSettings, GenerationParams
from lightship.serving.supervisor import Care, Supervisor

QUICK = Care(backoff=0.05, interval=0.05)
STRICT = Care(stall=1.0, backoff=0.05, interval=0.05)
ENDLESS = GenerationParams(max_tokens=10_000_000)


def faults(folder, **fields):
    """What the next engine in `folder` suffers from."""
    (folder / "fake.json").write_text(json.dumps(fields))


@contextlib.asynccontextmanager
async def supervised(folder, care=QUICK, kind=Supervisor, target="fake", settings=EngineSettings()):  # noqa: B008 (it is frozen)
    supervisor = kind(target, settings, care)
    supervisor.load(folder)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.close()
        assert not supervisor.alive


async def tokens(supervisor, prompt=1, count=5):
    """The tokens that come after `prompt`."""
    found = []
    async for event in supervisor.generate([prompt], GenerationParams(max_tokens=count)):
        found.extend(event.token_ids)
    return found


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def running(supervisor, prompt=1):
    """A stream that has begun."""
    stream = supervisor.generate([prompt], ENDLESS)
    await anext(stream)
    return stream


async def drained(stream):
    async for _ in stream:
        pass
