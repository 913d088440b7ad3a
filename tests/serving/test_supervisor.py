"""The supervisor over a real child process with `FakeEngine` and its faults, and once over a real tiny model."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from lightship.bundle import Bundle
from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import EngineDied, EngineError
from lightship.serving.supervisor import TOKENLESS, Care, Supervisor, Watchdog, once_more
from tests.serving.supervised import QUICK, STRICT, drained, faults, running, supervised, tokens, until

# ── Death ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_engine_ends_its_streams_and_another_serves(tmp_path, kind, caplog):
    async def run():
        async with supervised(tmp_path) as supervisor:
            first = supervisor.pid
            streams = [await running(supervisor) for _ in range(3)]
            await until(lambda: supervisor.stats["running"] == 3 and supervisor.resident())
            os.kill(first, kind)
            for stream in streams:
                with pytest.raises(EngineDied):
                    await drained(stream)
            assert not supervisor.ready and supervisor.live
            assert supervisor.resident() is None and supervisor.stats.keys() >= {"vocabulary"}
            assert not supervisor.stats.keys() & {"running", "waiting", "cache_usage"}  # these went with it
            await supervisor.recovered(10)
            assert supervisor.pid != first and supervisor.restarts == 1 and supervisor.failure is None
            assert await tokens(supervisor, 7) == [8, 9, 10, 11, 12]
            assert not psutil.pid_exists(first)  # reaped

    asyncio.run(run())
    assert kind.name in caplog.text


def test_a_crash_inside_a_step_is_survived(tmp_path):
    faults(tmp_path, segfault_after=3)

    async def run():
        async with supervised(tmp_path) as supervisor:
            faults(tmp_path)
            with pytest.raises(EngineDied):
                await tokens(supervisor, count=9)
            await supervisor.recovered(10)
            assert await tokens(supervisor) == [2, 3, 4, 5, 6]

    asyncio.run(run())


def test_an_exception_in_a_step_is_the_death_of_the_engine(tmp_path):
    faults(tmp_path, fail_after=3)

    async def run():
        async with supervised(tmp_path) as supervisor:
            faults(tmp_path)
            with pytest.raises(EngineDied, match="told to fail"):
                await tokens(supervisor, count=9)
            assert "told to fail" in supervisor.failure
            await supervisor.recovered(10)
            assert len(await tokens(supervisor, count=9)) == 9

    asyncio.run(run())


def test_nothing_of_an_old_engine_reaches_a_new_stream(tmp_path):
    """The old child is stopped with events in its buffers, and replaced; the new stream has the same number."""

    async def run():
        async with supervised(tmp_path) as supervisor:
            old = await running(supervisor, 100)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: not supervisor.ready)
            await supervisor.recovered(10)
            assert await tokens(supervisor, 7, 50) == list(range(8, 58))
            with pytest.raises(EngineDied):
                await drained(old)

    asyncio.run(run())


def test_restarts_are_bounded_and_then_it_stays_down(tmp_path):
    faults(tmp_path, fail_after=0)

    async def run():
        async with supervised(tmp_path, replace(QUICK, restarts=2)) as supervisor:
            for _ in range(3):
                await supervisor.recovered(10)
                with pytest.raises(EngineDied):
                    await tokens(supervisor)
            with pytest.raises(EngineDied, match=r"stays down.*told to fail"):
                await supervisor.recovered(10)
            assert supervisor.down and not supervisor.live and not supervisor.ready and not supervisor.alive
            assert supervisor.restarts == 2
            with pytest.raises(EngineDied):
                await tokens(supervisor)

    asyncio.run(run())


def test_restarts_long_ago_do_not_count(tmp_path):
    async def run():
        async with supervised(tmp_path, replace(QUICK, restarts=1, window=0.2)) as supervisor:
            for count in range(3):
                await asyncio.sleep(0.25)
                os.kill(supervisor.pid, signal.SIGKILL)
                await until(lambda count=count: supervisor.restarts == count + 1 and supervisor.ready)

    asyncio.run(run())


def test_an_engine_that_cannot_be_loaded_again_is_tried_and_given_up(tmp_path):
    async def run():
        async with supervised(tmp_path, replace(QUICK, restarts=2)) as supervisor:
            (tmp_path / "fake.json").write_text("{")
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: supervisor.down)
            assert "cannot be loaded" in supervisor.failure and supervisor.restarts == 2

    asyncio.run(run())


def test_a_load_that_hangs_is_cut_off_except_the_first(tmp_path):
    async def run():
        async with supervised(tmp_path, STRICT) as supervisor:
            supervisor._load_seconds = 0.01
            faults(tmp_path, load=60)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: supervisor.failure and "was not loaded after" in supervisor.failure)
            supervisor._load_seconds = 5.0
            faults(tmp_path)
            await supervisor.recovered(10)
            assert len(await tokens(supervisor)) == 5

    asyncio.run(run())


def test_what_does_not_load_the_first_time_is_raised(tmp_path):
    (tmp_path / "fake.json").write_text('{"unheard_of": 1}')

    async def run():
        supervisor = Supervisor("fake", EngineSettings(), QUICK)
        supervisor.load(tmp_path)
        with pytest.raises(EngineError, match=r"cannot be loaded.*unheard_of") as raised:
            await supervisor.start()
        assert not isinstance(raised.value, EngineDied)
        await supervisor.close()
        assert not supervisor.alive and supervisor.restarts == 0

    asyncio.run(run())


# ── Stuck ───────────────────────────────────────────────────────────────────


def test_a_step_that_hangs_is_found_killed_and_replaced(tmp_path):
    faults(tmp_path, hang_after=3)

    async def run():
        async with supervised(tmp_path, STRICT) as supervisor:
            first, began = supervisor.pid, time.monotonic()
            faults(tmp_path, load=0.5)
            with pytest.raises(EngineDied):
                await tokens(supervisor, count=9)
            assert time.monotonic() - began >= 1.0  # not before its time
            assert supervisor.stuck and not supervisor.live and "stuck" in supervisor.failure
            await supervisor.recovered(10)
            assert not supervisor.stuck and supervisor.live and supervisor.pid != first
            assert not psutil.pid_exists(first)
            assert await tokens(supervisor) == [2, 3, 4, 5, 6]

    asyncio.run(run())


def test_clients_that_leave_do_not_hide_a_stuck_engine(tmp_path):
    """Each waits for less than the watchdog does, and none is there when it strikes."""
    faults(tmp_path, hang_after=0)

    async def run():
        async with supervised(tmp_path, STRICT) as supervisor:
            faults(tmp_path)
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await tokens(supervisor)
            await until(lambda: supervisor.restarts == 1 and supervisor.ready)

    asyncio.run(run())


def test_steps_without_tokens_are_progress_and_an_idle_engine_is_not_stuck(tmp_path):
    """The first token takes longer than the watchdog waits, and then nothing happens for longer than that."""
    faults(tmp_path, slow=0.4, prefill=4)

    async def run():
        async with supervised(tmp_path, STRICT) as supervisor:
            assert await tokens(supervisor, count=1) == [2]
            await asyncio.sleep(1.2)
            assert supervisor.restarts == 0 and supervisor.ready
            assert supervisor.stats["steps"] == 5 and supervisor.stats["running"] == 0

    asyncio.run(run())


def test_the_watchdog_counts_what_it_saw():
    """Ten looks a second; with work and no progress for 1 s it barks, whatever was before."""

    def barks(looks, stall=1.0):
        dog = Watchdog(stall, 0.1)
        return [dog.stuck(working, progress, produced, now) for now, working, progress, produced in looks]

    still = [(n / 10, True, 5, 5) for n in range(13)]
    assert barks(still).index(True) in (11, 12)
    assert not any(barks([(n / 10, False, 5, 5) for n in range(100)]))
    assert not any(barks([(n / 10, n % 9 != 0, 5, 5) for n in range(100)]))
    assert not any(barks([(n / 10, True, n // 9, n // 9) for n in range(100)]))
    tokenless = barks([(n / 10, True, n, 5) for n in range(10 * TOKENLESS + 20)])
    assert abs(tokenless.index(True) - 10 * TOKENLESS) <= 2
    asleep = [(0.0, True, 5, 5), (0.1, True, 5, 5), (3600.0, True, 5, 5), (3600.1, True, 6, 5)]
    assert not any(barks(asleep))


def test_a_stopped_parent_does_not_blame_its_engine(tmp_path):
    """As when the machine sleeps: both are stopped for longer than the watchdog waits."""
    faults(tmp_path, slow=0.3)

    async def run():
        async with supervised(tmp_path, STRICT) as supervisor:
            stream = await running(supervisor)
            await asyncio.sleep(0.15)  # in mid-step, looked at
            os.kill(supervisor.pid, signal.SIGSTOP)
            time.sleep(1.5)
            await asyncio.sleep(0.15)
            os.kill(supervisor.pid, signal.SIGCONT)
            await anext(stream)
            await asyncio.sleep(0.3)
            assert supervisor.restarts == 0 and supervisor.ready
            await stream.aclose()

    asyncio.run(run())


# ── Once more ───────────────────────────────────────────────────────────────


def test_a_request_of_which_nothing_was_sent_is_run_again_once(tmp_path):
    faults(tmp_path, fail_after=2)

    async def run():
        async with supervised(tmp_path) as supervisor:
            faults(tmp_path)
            assert await once_more(lambda: tokens(supervisor), lambda: False, supervisor, 10) == [2, 3, 4, 5, 6]
            assert supervisor.restarts == 1
            faults(tmp_path, fail_after=2)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: supervisor.restarts == 2 and supervisor.ready)
            with pytest.raises(EngineDied):
                await once_more(lambda: tokens(supervisor), lambda: False, supervisor, 10)
            await until(lambda: supervisor.restarts == 4)

    asyncio.run(run())


def test_a_request_of_which_something_was_sent_is_not_run_again(tmp_path):
    faults(tmp_path, fail_after=2)

    async def run():
        async with supervised(tmp_path) as supervisor:
            attempts = []

            async def attempt():
                attempts.append(1)
                return await tokens(supervisor)

            with pytest.raises(EngineDied, match="told to fail"):
                await once_more(attempt, lambda: True, supervisor, 10)
            assert len(attempts) == 1

    asyncio.run(run())


def test_an_engine_killed_under_load_loses_no_request_of_which_nothing_was_sent(tmp_path):
    faults(tmp_path, slow=0.01)

    async def run():
        async with supervised(tmp_path) as supervisor:

            def ask(prompt):
                return once_more(lambda: tokens(supervisor, prompt, 30), lambda: False, supervisor, 20)

            asked = [asyncio.create_task(ask(prompt)) for prompt in range(100)]
            await until(lambda: supervisor._worker.produced > 500)
            os.kill(supervisor.pid, signal.SIGKILL)
            found = await asyncio.gather(*asked)
            assert found == [list(range(prompt + 1, prompt + 31)) for prompt in range(100)]
            assert supervisor.restarts == 1

    asyncio.run(run())


def test_waiting_for_the_next_engine_ends(tmp_path):
    async def run():
        async with supervised(tmp_path) as supervisor:
            faults(tmp_path, load=60)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: not supervisor.ready)
            with pytest.raises(EngineDied, match="not back after"):
                await supervisor.recovered(0.2)
            waiting = asyncio.create_task(supervisor.recovered(60))
            await asyncio.sleep(0.05)
            await supervisor.close()
            with pytest.raises(EngineDied):
                await waiting

    asyncio.run(run())


# ── Closing ─────────────────────────────────────────────────────────────────


def children():
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"}


STATES = ["spawned", "loading", "ready", "busy", "hanging", "loading again", "waiting to start again", "down"]


@pytest.mark.parametrize("state", STATES)
def test_closing_leaves_no_child_in_any_state(tmp_path, state):
    faults(tmp_path, **({"load": 60} if state == "loading" else {"hang_after": 1} if state == "hanging" else {}))
    before = children()

    async def run():
        care = Care(backoff=60, restarts=0 if state == "down" else 5)
        supervisor = Supervisor("fake", EngineSettings(), care)
        supervisor.spawn()
        if state != "spawned":
            supervisor.load(tmp_path)
            starting = asyncio.create_task(supervisor.start())
            await asyncio.sleep(0.2)
        if state not in ("spawned", "loading"):
            await starting
        if state in ("busy", "hanging"):
            stream = await running(supervisor)
        if state == "hanging":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await drained(stream)
        if state in ("loading again", "waiting to start again", "down"):
            faults(tmp_path, load=60 if state == "loading again" else 0)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: supervisor.down or supervisor.restarts)
            if state == "waiting to start again":
                await supervisor.recovered(10)
                os.kill(supervisor.pid, signal.SIGKILL)
                await until(lambda: not supervisor.ready)
                await asyncio.sleep(0.2)
                assert not supervisor.alive
        began = time.monotonic()
        await supervisor.close()
        assert time.monotonic() - began < 8
        assert not supervisor.alive and children() <= before
        await asyncio.sleep(0.2)
        assert children() <= before  # nothing starts another
        if state == "loading":
            with pytest.raises(EngineDied):
                await starting
        if state in ("busy", "hanging"):
            await stream.aclose()

    asyncio.run(run())


def test_a_stuck_engine_ends_when_its_parent_is_killed(tmp_path):
    faults(tmp_path, hang_after=0)
    code = (
        "import asyncio, pathlib, sys\nfrom lightship.engine import EngineSettings, GenerationParams\n"
        "from lightship.serving.supervisor import Supervisor\n"
        "async def main():\n    supervisor = Supervisor('fake', EngineSettings())\n"
        "    supervisor.load(pathlib.Path(sys.argv[1]))\n    await supervisor.start()\n"
        "    waiting = asyncio.create_task(anext(supervisor.generate([1], GenerationParams())))\n"
        "    await asyncio.sleep(0.3)\n    print(supervisor.pid, flush=True)\n    await waiting\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and child.is_running() and child.status() != "zombie":
        time.sleep(0.02)
    assert not child.is_running() or child.status() == "zombie"


# ── A real model ────────────────────────────────────────────────────────────


def test_a_real_engine_is_killed_in_mid_stream_and_says_the_same_again(bundle_path, caplog):
    bundle = Bundle.open(bundle_path)
    folder, params = bundle.target_folder(bundle.targets[0]), GenerationParams(max_tokens=40, ignore_eos=True)

    async def said(supervisor):
        return [token async for event in supervisor.generate([5, 6, 7], params) for token in event.token_ids]

    async def run():
        async with supervised(folder, Care(interval=0.1), target=bundle.targets[0]) as supervisor:
            before = await said(supervisor)
            assert len(before) == 40 and supervisor.memory.at_ready > 50 * 2**20
            stream = supervisor.generate([5, 6, 7], GenerationParams(max_tokens=1900, ignore_eos=True))
            await anext(stream)
            os.kill(supervisor.pid, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await drained(stream)
            await supervisor.recovered(60)
            assert await said(supervisor) == before

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert "SIGKILL" in caplog.text and "ready again" in caplog.text
