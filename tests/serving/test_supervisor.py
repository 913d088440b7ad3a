"""The supervisor over a real child process with `FakeEngine` and its faults, and once over a real tiny model."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import psutil
import pytest

from lightship.bundle import Bundle
from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError
from lightship.serving import wire
from lightship.serving.generation import RECOVERY
from lightship.serving.server import Serving
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import TOKENLESS, Care, Growth, Memory, Supervisor, Watchdog, once_more
from lightship.serving.worker import Worker, _backlog

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


# ── Death ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_engine_ends_its_streams_and_another_serves(tmp_path, kind, caplog):
    async def run():
        async with supervised(tmp_path) as supervisor:
            first = supervisor.pid
            streams = [await running(supervisor) for _ in range(3)]
            os.kill(first, kind)
            for stream in streams:
                with pytest.raises(EngineDied):
                    await drained(stream)
            assert not supervisor.ready and supervisor.live
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


# ── Many at once ────────────────────────────────────────────────────────────


def test_two_hundred_cancelled_at_once_and_the_next_is_answered(tmp_path):
    faults(tmp_path, slow=0.01)

    async def run():
        async with supervised(tmp_path) as supervisor:
            streams = [asyncio.create_task(drained(supervisor.generate([1], ENDLESS))) for _ in range(200)]
            await until(lambda: supervisor.stats.get("running") == 200)
            for stream in streams:
                stream.cancel()
            began = time.monotonic()
            assert await tokens(supervisor) == [2, 3, 4, 5, 6]
            assert time.monotonic() - began < 5
            assert all(isinstance(end, asyncio.CancelledError) for end in
                       await asyncio.gather(*streams, return_exceptions=True))  # fmt: skip
            await until(lambda: not supervisor._worker.working)
            assert supervisor.stats["running"] == 0 and not supervisor._worker._streams

    asyncio.run(run())


def test_prompts_for_a_stuck_engine_wait_in_their_requests(tmp_path):
    """What is written for the child stays small, and everyone who waits is told when it dies."""
    faults(tmp_path, hang_after=0)

    async def run():
        async with supervised(tmp_path, Care(stall=1.5, interval=0.05)) as supervisor:
            faults(tmp_path)
            prompt = list(range(200)) * 500  # 150 KB
            requests = [asyncio.create_task(drained(supervisor.generate(prompt, ENDLESS))) for _ in range(40)]
            await asyncio.sleep(0.5)
            assert supervisor._worker._writer.transport.get_write_buffer_size() < 500_000
            ends = await asyncio.gather(*requests, return_exceptions=True)
            assert {type(end) for end in ends} == {EngineDied}
            await supervisor.recovered(10)

    asyncio.run(run())


# ── A child that lies ───────────────────────────────────────────────────────

LIAR = """
import socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
connection.recv(65536)
connection.sendall(bytes.fromhex(sys.argv[2]))
connection.recv(65536)
connection.sendall(bytes.fromhex(sys.argv[3]))
while connection.recv(65536):
    pass
import time
time.sleep(60)
"""
DEEP = msgspec.msgpack.encode(wire.Progress(1, 1, False, {})).replace(b"\x80", b"\x81\xa1x" + b"\x91" * 5000 + b"\xc0")
LIES = {
    "no message": b"\x00\x00\x00\x04\xc1\xc1\xc1\xc1",
    "too long": b"\xff\xff\xff\xff" + b"x" * 1000,
    "tokens that are none": wire.frame(wire.Gained([Event(1, ("a",))])),
    "a type of none": b"\x00\x00\x00\x01\xc0",
    "deep": wire.HEADER.pack(len(DEEP)) + DEEP,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_child_that_sends_garbage_is_killed_and_replaced(tmp_path, lie):
    class Liar(Worker):
        def _command(self, descriptor):
            ready = wire.frame(wire.Ready({}))
            return [sys.executable, "-S", "-c", LIAR, str(descriptor), ready.hex(), lie.hex()]

    class Lied(Supervisor):
        def _new(self):
            return Worker("fake", EngineSettings()) if hasattr(self, "_worker") else Liar("fake", EngineSettings())

    async def run():
        async with supervised(tmp_path, kind=Lied) as supervisor:
            first = supervisor.pid
            with pytest.raises(EngineDied, match="cannot be read"):
                await tokens(supervisor)
            await supervisor.recovered(10)
            assert supervisor.pid != first and not psutil.pid_exists(first)
            assert await tokens(supervisor) == [2, 3, 4, 5, 6]

    asyncio.run(run())


def test_an_answer_that_was_complete_is_whole_when_its_engine_goes_before_it_is_read(tmp_path):
    faults(tmp_path, slow=0.1)  # so that the first piece is not all of it already

    async def run():
        async with supervised(tmp_path) as supervisor:
            stream = supervisor.generate([1], GenerationParams(max_tokens=6))
            first = await anext(stream)
            found, finish = list(first.token_ids), first.finish_reason
            await until(lambda: supervisor._worker.produced == 6 and not supervisor._worker.working)
            os.kill(supervisor.pid, signal.SIGKILL)
            await until(lambda: not supervisor._worker.ready)
            async for event in stream:
                found += event.token_ids
                finish = event.finish_reason
            return found, finish

    assert asyncio.run(run()) == ([2, 3, 4, 5, 6, 7], "length")


def test_who_reads_slowly_gets_larger_pieces():
    """Tokens that wait are one event; an error comes after the tokens before it, and nothing after the end."""

    def backlog(*answers):
        stream = asyncio.Queue()
        for each in answers[1:]:
            stream.put_nowait(each)
        return _backlog(answers[0], stream)

    one, two, last = Event(1, (2,), (-0.5,)), Event(1, (3, 4), (-1.0, -2.0)), Event(1, (5,), (-3.0,), "stop")
    died, broken = EngineDied("gone"), Event(1, finish_reason="error", error="full")
    assert backlog(one) == [one]
    assert backlog(one, two) == [Event(1, (2, 3, 4), (-0.5, -1.0, -2.0))]
    assert backlog(one, two, last, died) == [Event(1, (2, 3, 4, 5), (-0.5, -1.0, -2.0, -3.0), "stop")]
    assert backlog(one, two, died) == [Event(1, (2, 3, 4), (-0.5, -1.0, -2.0)), died]
    late = replace(two, at=7.0)
    assert backlog(one, late)[0].at == backlog(one, late, died)[0].at == 7.0
    assert backlog(one, broken) == [one, broken] and backlog(died) == [died]


def test_a_token_is_as_old_as_its_step_however_late_it_is_read(tmp_path):
    async def run():
        async with supervised(tmp_path) as supervisor:
            began, stream = time.monotonic(), supervisor.generate([1], GenerationParams(max_tokens=9))
            first = await anext(stream)
            await until(lambda: supervisor._worker.produced == 9)
            given = time.monotonic()
            await asyncio.sleep(0.05)
            rest = [event async for event in stream]
            assert began < first.at <= rest[-1].at <= given and sum(len(event.token_ids) for event in rest) == 8

    asyncio.run(run())


# ── Memory ──────────────────────────────────────────────────────────────────


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
