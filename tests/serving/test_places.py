"""The engine's loop: who takes the place of a finished request is in the next step."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightship.engine import EngineSettings, GenerationParams
from lightship.serving import wire, worker


class Parent:
    """The other end of the socket, read message by message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, bytearray()

    def send(self, *messages: wire.Order) -> None:
        """All at once."""
        self._connection.sendall(b"".join(map(wire.frame, messages)))

    def read(self) -> wire.Reply:
        return wire.REPLIES.decode(self._exactly(*wire.HEADER.unpack(self._exactly(wire.HEADER.size))))

    def gained(self) -> wire.Gained:
        """What the next step that gave something gave."""
        while not isinstance(message := self.read(), wire.Gained):
            pass
        return message

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._buffer += self._connection.recv(1 << 16)
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    (tmp_path / "fake.json").write_text(json.dumps({"slow": 0.01}))
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    loop = worker._Loop(theirs, "fake")

    def run() -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # as `main` does
            loop.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    parent = Parent(ours)
    parent.send(wire.Load(str(tmp_path), EngineSettings()))
    assert isinstance(parent.read(), wire.Ready)
    yield parent
    ours.close()
    thread.join(30)
    assert not thread.is_alive()
    theirs.close()


def ask(parent: Parent, number: int, tokens: int) -> None:
    parent.send(wire.Submit(number, [number], GenerationParams(max_tokens=tokens)))


def after_the_first_ends(parent: Parent) -> set[int]:
    """Request 2 ends while 1 goes on; a client takes its time and asks 3: who gains in the next step."""
    ask(parent, 1, 200)
    ask(parent, 2, 1)
    while not any(event.request_id == 2 for event in parent.gained().events):
        pass
    time.sleep(0.2)
    ask(parent, 3, 50)
    return {event.request_id for event in parent.gained().events}


def test_the_step_after_an_end_waits_for_who_comes_instead(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LINGER", 10_000)
    monkeypatch.setattr(worker, "LINGER_MOST", 20.0)
    assert after_the_first_ends(parent) == {1, 3}


def test_it_waits_for_a_bounded_time(parent: Parent) -> None:
    assert after_the_first_ends(parent) == {1}


def test_when_all_end_at_once_those_that_come_instead_begin_together(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LINGER", 10_000)
    monkeypatch.setattr(worker, "LINGER_MOST", 20.0)
    parent.send(*(wire.Submit(number, [number], GenerationParams(max_tokens=1)) for number in (1, 2)))
    assert {event.request_id for event in parent.gained().events} == {1, 2}
    ask(parent, 3, 1)
    time.sleep(0.2)
    ask(parent, 4, 1)
    assert {event.request_id for event in parent.gained().events} == {3, 4}
