"""An engine whose memory grows: when it is replaced, and what becomes of those who ask meanwhile."""

import asyncio
import logging
import os
import time
from dataclasses import replace

import pytest

from lightship.errors import EngineDied
from lightship.serving.generation import RECOVERY
from lightship.serving.server import Serving
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Care, Growth, Memory, once_more
from tests.serving.supervised import ENDLESS, QUICK, drained, faults, supervised, tokens, until


def test_an_engine_that_grows_is_replaced_when_it_is_idle(tmp_path, caplog):
    faults(tmp_path, leak=2**20)
    caplog.set_level(logging.WARNING, "lightship.serving")  # whatever the level of the root is

    async def run():
        async with supervised(tmp_path) as supervisor:
            await until(lambda: supervisor.memory)
            limit = supervisor.memory.at_ready + 50 * 2**20
        async with supervised(tmp_path, replace(QUICK, memory_limit=limit, window=1.0)) as supervisor:
            first = supervisor.pid
            assert len(await tokens(supervisor, count=100)) == 100  # not cut off
            await until(lambda: supervisor.restarts == 1 and supervisor.ready)
            assert supervisor.pid != first and supervisor.failure is None and not supervisor._ends
            await until(lambda: supervisor.memory.now < limit)
            assert supervisor.memory.peak < limit

    asyncio.run(run())
    assert "when loaded" in caplog.text


def test_memory_is_limited_when_nobody_says_how(tmp_path, monkeypatch):
    faults(tmp_path, leak=2**20)
    monkeypatch.setattr("lightship.serving.supervisor.SPARE", 50 * 2**20 - 2**30)  # 50 MiB with the KV cache

    async def run():
        async with supervised(tmp_path, replace(QUICK, window=1.0)) as supervisor:
            assert supervisor._settings.kv_cache_gb == 1
            await tokens(supervisor, count=100)
            await until(lambda: supervisor.restarts == 1 and supervisor.ready)

    asyncio.run(run())


def test_an_engine_that_grows_and_never_rests_is_drained_then_not_waited_for(tmp_path):
    faults(tmp_path, leak=2**20, slow=0.01)

    async def run():
        async with supervised(tmp_path) as supervisor:
            await until(lambda: supervisor.memory)
            limit = supervisor.memory.at_ready + 20 * 2**20
        async with supervised(tmp_path, replace(QUICK, memory_limit=limit, window=0.5, grace=0.5)) as supervisor:
            first = supervisor.pid
            busy = asyncio.create_task(drained(supervisor.generate([1], ENDLESS)))
            await until(lambda: supervisor._worker.draining)
            assert not supervisor.ready and supervisor.pid == first and not busy.done()
            with pytest.raises(EngineDied, match="about to be started again"):
                await tokens(supervisor)
            faults(tmp_path)
            assert len(await once_more(lambda: tokens(supervisor), lambda: False, supervisor, 10)) == 5
            assert supervisor.pid != first
            with pytest.raises(EngineDied):
                await busy

    asyncio.run(run())


@pytest.mark.parametrize(("loading", "drain"), [(10, 20), (0, 30), (40, 0)])
def test_who_comes_while_an_engine_drains_sees_the_next_one_in_time(monkeypatch, loading, drain):
    """Draining and loading together take no more than half of what a request waits for its first token."""

    class Busy:
        pid, working, draining = os.getpid(), True, False

    seen = Memory(200 * 2**20, 100 * 2**20, 200 * 2**20)
    monkeypatch.setattr(Growth, "_sample", lambda self: seen)
    growth = Growth(Busy(), Care(wait=60, grace=60, memory_limit=150 * 2**20), 0, loading)
    began = time.monotonic() + 1000
    assert growth.trouble(began) is None and growth.trouble(began + 59) is None and not growth._worker.draining
    if drain:
        assert growth.trouble(began + 61) is None and growth._worker.draining
        assert growth.trouble(began + 59 + drain) is None
    assert growth.trouble(began + 61 + drain).planned


def test_an_engine_knows_how_long_requests_wait():
    with Serving(ServeSettings(keys=None, first_token_deadline=20), "127.0.0.1", 0) as serving:
        assert serving.engine("fake").care.wait == 20
    assert ServeSettings(first_token_deadline=600).cared.wait == RECOVERY


def test_a_limit_that_each_engine_passes_restarts_them_now_and_then_only(tmp_path):
    faults(tmp_path, leak=64 * 2**20)

    async def run():
        async with supervised(tmp_path) as supervisor:
            await until(lambda: supervisor.memory)
            limit = supervisor.memory.at_ready + 20 * 2**20
        async with supervised(tmp_path, replace(QUICK, memory_limit=limit, window=5.0, restarts=5)) as supervisor:
            began = time.monotonic()
            while time.monotonic() < began + 2.5:
                await once_more(lambda: tokens(supervisor, count=1), lambda: False, supervisor, 10)
                await asyncio.sleep(0.05)
            assert 1 <= supervisor.restarts <= 3 and not supervisor.down

    asyncio.run(run())


def test_a_limit_below_what_the_model_needs_is_said_and_not_enforced(tmp_path, caplog):
    async def run():
        async with supervised(tmp_path, replace(QUICK, memory_limit=2**20, window=0.5)) as supervisor:
            assert len(await tokens(supervisor)) == 5
            await asyncio.sleep(0.3)
            assert supervisor.restarts == 0

    asyncio.run(run())
    assert "not enforced" in caplog.text
