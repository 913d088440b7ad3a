"""The child process with `FakeEngine`: many requests at once, what it may say, and how its tokens are read."""

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace

import msgspec
import psutil
import pytest

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied
from lightship.serving import wire
from lightship.serving.supervisor import Care, Supervisor
from lightship.serving.worker import Worker, _backlog
from tests.serving.supervised import ENDLESS, drained, faults, supervised, tokens, until

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
            events = [await anext(stream)]
            await until(lambda: supervisor._worker.produced == 9)
            given = time.monotonic()
            await asyncio.sleep(0.05)
            events += [event async for event in stream]
            assert began < events[0].at <= events[-1].at <= given
            assert sum(len(event.token_ids) for event in events) == 9

    asyncio.run(run())
