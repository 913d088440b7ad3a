"""The engine in a process of its own: its steps hold the interpreter lock, and when it dies the API must not.

Parent and child talk in the messages of `wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightship.engine import Engine, EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError, LightshipError, RequestError
from lightship.find import find
from lightship.serving import wire

log = logging.getLogger("lightship.serving")
Answer = Event | LightshipError
PATIENCE = 10.0  # seconds that a killed process may take to give its memory back
REPORT = 0.5  # seconds between two reports of a busy engine, at least


# ── The parent's side ───────────────────────────────────────────────────────


class Worker:
    """A child process with one engine: `load`, `start`, then `generate`; when it dies every stream raises `EngineDied`.

    `spawn` may come first, to let it import its runtime while the parent makes sure of what it will load. A dead worker
    stays dead: `Supervisor` makes another.
    """

    def __init__(self, target: str, settings: EngineSettings, cores: frozenset[int] | None = None) -> None:
        """`cores`: the child is held to these, None for all that this process may use."""
        self._target, self._settings, self._cores = target, settings, cores
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        # A stream holds at most one event a token, so at most `max_tokens`, however slowly its client reads.
        self._streams: dict[int, asyncio.Queue[Answer]] = {}
        self._next_id = 0
        self._sent = self._handled = 0  # messages
        self._busy = False
        self.ready = False
        self.draining = False  # set it to take no new requests
        self.failure: str | None = None  # why the engine died
        self.stats: dict[str, Any] = {}
        self.progress = 0  # signs of life so far: they come with every step, at most twice a second without tokens
        self.produced = 0  # tokens so far

    @property
    def alive(self) -> bool:
        """Whether the child runs, loading or ready."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid if self._process else None

    @property
    def working(self) -> bool:
        """Whether the child has not yet said that all it was told is done. Requests that were given up count until
        then, so that clients which do not wait for a stuck engine do not hide that it is stuck."""
        return self.ready and (self._busy or self._handled != self._sent)

    def spawn(self) -> None:
        """Start the child, which imports the runtime of its target and waits. It ends when this process does."""
        self._socket, theirs = socket.socketpair()
        # A process group of its own: Ctrl-C in the terminal reaches the parent only. Libraries print to stderr.
        with theirs:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, process_group=0,
            )  # fmt: skip

    def _command(self, descriptor: int) -> list[str]:
        held = [] if self._cores is None else [",".join(map(str, sorted(self._cores)))]
        return [sys.executable, "-P", "-m", "lightship.serving.worker", str(descriptor), self._target, *held]

    def load(self, folder: Path) -> None:
        """Let the child load the runtime folder, once it may be trusted."""
        if self._socket is None:
            self.spawn()
        assert self._socket is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: `start` tells
            self._socket.sendall(wire.frame(wire.Load(str(folder), self._settings)))

    def kill(self) -> None:
        """End a child that was spawned and never started."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()

    async def start(self) -> None:
        """Wait until the engine that `load` asked for is loaded. Raises `EngineError` when it cannot be."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        try:
            first = await wire.read(reader)
        except EngineDied as error:
            raise EngineDied(f"{error.message} while loading the model") from error
        if isinstance(first, wire.Failed):
            raise EngineError(f"the engine cannot be loaded: {first.message}")
        if not isinstance(first, wire.Ready):
            raise EngineDied("the engine process spoke before it was ready")
        self.stats, self.ready = {**first.stats, "steps": 0}, True
        self._reading = asyncio.create_task(self._listen(reader))

    async def ended(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the end of a child that was started."""
        assert self._reading is not None
        await asyncio.wait({self._reading}, timeout=timeout)
        return self._reading.done() or not self.alive

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Until the child ends, or says what it must not; then nothing of it is believed any more."""
        failure = wire.ENDED
        try:
            while True:
                self._take(await wire.read(reader))
        except EngineDied as error:
            failure = error.message
        except Exception:
            log.exception("what the engine process said was not understood")
        finally:
            self.ready, self.failure = False, failure
            for stream in self._streams.values():
                stream.put_nowait(EngineDied(failure))

    def _take(self, message: wire.Reply) -> None:
        self.progress += 1
        match message:
            case wire.Gained(events):
                for event in events:
                    self.produced += len(event.token_ids)
                    self._give(event.request_id, event)
            case wire.Progress():
                self._handled, self._busy = message.handled, message.busy
                self.stats = {**message.stats, "steps": message.steps}
            case wire.Refused():
                error = RequestError(message.message, message.param, message.code, message.status)
                self._give(message.id, error)
            case wire.Failed():
                raise EngineDied(f"{wire.ENDED}: {message.message}")
            case wire.Ready():
                raise EngineDied("the engine process was ready twice")

    def _give(self, request_id: int, what: Answer) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:  # else it was given up meanwhile
            stream.put_nowait(what)

    async def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """The events of one request, the last with its finish reason. Leaving early cancels the request."""
        self._next_id += 1
        request_id, finished = self._next_id, False
        order = wire.frame(wire.Submit(request_id, list(tokens), params))
        async with self._turn:  # so that no more than one prompt waits outside the buffer of the socket
            await self._room()
            stream = self._streams[request_id] = asyncio.Queue()
            self._send(order)
        try:
            while not finished:
                for got in _backlog(await stream.get(), stream):
                    if isinstance(got, LightshipError):
                        finished = True
                        raise got
                    if got.finish_reason == "error":
                        finished = True
                        raise EngineError(got.error or "the engine gave up on this request")
                    finished = got.finish_reason is not None
                    yield got
        finally:
            del self._streams[request_id]
            if not finished and self.ready:
                self._send(wire.frame(wire.Cancel(request_id)))

    async def _room(self) -> None:
        """Wait until the child has read what was sent before. Raises `EngineDied` when it takes no more."""
        with contextlib.suppress(ConnectionError):  # `ready` tells
            if self._writer is not None:
                await self._writer.drain()
        if not self.ready:
            raise EngineDied("the engine is not running")
        if self.draining:
            raise EngineDied("the engine is about to be started again")

    def _send(self, order: bytes) -> None:
        assert self._writer is not None
        self._sent += 1
        self._writer.write(order)

    async def recovered(self, timeout: float) -> None:
        """Raises `EngineDied`: nobody starts a worker again."""
        raise EngineDied(f"the engine process ended: {self.failure}" if self.failure else "the engine process ended")

    async def close(self) -> None:
        """Kill the child, whatever it is doing: it holds nothing that has to be saved."""
        self.ready = False
        if self._writer is not None:
            self._writer.transport.abort()  # `close` would wait until a dead child has read the rest
        elif self._socket is not None:
            self._socket.close()
        if self._process is None:
            return
        self._process.kill()
        try:
            code = await asyncio.to_thread(self._process.wait, PATIENCE)
        except subprocess.TimeoutExpired:  # the kernel holds it, in a read from a dead disk for instance
            log.error("the engine process %d was killed and does not end", self._process.pid)
            return
        if self._reading is not None:
            await asyncio.wait({self._reading})
        if self.failure == wire.ENDED and code < 0:
            self.failure = f"{wire.ENDED}: {signal.Signals(-code).name}"


def _backlog(got: Answer, stream: asyncio.Queue[Answer]) -> list[Answer]:
    """`got` and all behind it up to the end of the answer, tokens that follow each other as one event, of the time
    of the last: who cannot keep up with the engine gets larger pieces instead of falling further behind."""
    if stream.empty():
        return [got]
    found, tokens, logprobs, request_id = list[Answer](), list[int](), list[float](), 0
    at: float | None = None
    while True:
        if isinstance(got, Event) and got.finish_reason != "error":
            request_id, at = got.request_id, got.at
            tokens += got.token_ids
            logprobs += got.logprobs
            ended = got.finish_reason is not None
            if ended or stream.empty():
                found.append(replace(got, token_ids=tuple(tokens), logprobs=tuple(logprobs)))
        else:  # the tokens before it go first
            ended = True
            if tokens:
                found.append(Event(request_id, tuple(tokens), tuple(logprobs), at=at))
            found.append(got)
        if ended or stream.empty():
            return found
        got = stream.get_nowait()


# ── The child's side ────────────────────────────────────────────────────────


class _Loop:
    """Reads requests, steps the engine, sends events."""

    def __init__(self, connection: socket.socket, target: str) -> None:
        self._connection, self._target = connection, target
        self._buffer = bytearray()
        self._outer: dict[int, int] = {}  # the engine's id → the parent's
        self._inner: dict[int, int] = {}  # and back
        self._steps = self._handled = 0
        self._told = (0, False)  # what the parent was told last: messages handled, whether busy
        self._told_at = 0.0

    def run(self) -> None:
        """Until the parent closes the socket."""
        engine = self._load()
        if engine is None:
            return
        try:
            while self._turn(engine):
                pass
        except (BrokenPipeError, ConnectionResetError):
            raise  # the parent is gone
        except Exception as error:  # the engine is dead, and this process with it
            self._fail(error)
            raise

    def _turn(self, engine: Engine) -> bool:
        """Take what has arrived, then step; whether to go on."""
        for order in self._orders(wait=not engine.busy()):
            if order is None:
                engine.close()
                return False
            self._handle(engine, order)
        if engine.busy():
            events = engine.step()
            self._steps += 1
            self._send_events(events)
        self._report(engine)
        return True

    def _load(self) -> Engine | None:
        try:
            target = find("targets", self._target)
            getattr(target, "preload", lambda: None)()
            order = next(iter(self._orders(wait=True)))
            if not isinstance(order, wire.Load):
                return None
            engine: Engine = target.open(Path(order.folder), order.settings)
        except Exception as error:  # whatever the runtime raises, the parent must hear of it
            self._fail(error)
            return None
        self._send(wire.Ready(engine.stats()))
        return engine

    def _send(self, message: wire.Reply) -> None:
        self._connection.sendall(wire.frame(message))

    def _fail(self, error: Exception) -> None:
        self._send(wire.Failed(f"{type(error).__name__}: {error}"[:2000]))

    def _report(self, engine: Engine) -> None:
        """Tell the parent that steps return, now and then, and at once when there is nothing left to do."""
        now, state = time.monotonic(), (self._handled, engine.busy())
        if now - self._told_at >= REPORT if state[1] else state != self._told:
            self._told, self._told_at = state, now
            self._send(wire.Progress(self._steps, *state, engine.stats()))

    def _orders(self, wait: bool) -> list[wire.Order | None]:
        """Whole messages that have arrived; None stands for the closed socket. Blocks for the first when `wait`."""
        found: list[wire.Order | None] = []
        while not found:
            if select.select([self._connection], [], [], None if wait else 0)[0]:
                try:
                    data = self._connection.recv(1 << 20)
                except ConnectionError:
                    data = b""
                if not data:
                    return [None]
                self._buffer += data
            found.extend(wire.split(self._buffer))
            if not wait:
                break
        return found

    def _handle(self, engine: Engine, order: wire.Order) -> None:
        self._handled += 1
        if isinstance(order, wire.Submit):
            self._submit(engine, order)
        elif isinstance(order, wire.Cancel) and order.id in self._inner:
            inner = self._inner.pop(order.id)
            del self._outer[inner]
            engine.cancel(inner)

    def _submit(self, engine: Engine, order: wire.Submit) -> None:
        try:
            inner = engine.submit(order.tokens, order.params)
        except LightshipError as error:
            param, code = getattr(error, "param", None), getattr(error, "code", None)
            self._send(wire.Refused(order.id, error.message, param, code, error.http_status))
        else:
            self._outer[inner], self._inner[order.id] = order.id, inner

    def _send_events(self, events: list[Event]) -> None:
        gained, now = list[Event](), time.monotonic()  # one clock for all processes of a machine
        for event in events:
            outer = self._outer.get(event.request_id)
            if outer is None:
                continue  # cancelled
            if event.finish_reason is not None:
                del self._outer[event.request_id], self._inner[outer]
            gained.append(replace(event, request_id=outer, at=now))
        if gained:
            self._send(wire.Gained(gained))


def _end_with_parent() -> None:
    """Linux: the kernel kills this process when the thread that started it ends, even in the middle of a step that
    hangs. Elsewhere it ends between two steps, when its socket closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)


def main(descriptor: int, target: str, cores: str = "") -> None:
    """The child: signals to stop belong to the parent, which lets streams finish and then closes the socket."""
    _end_with_parent()
    if cores:  # before the runtime is imported: its threads, and the memory they touch first, stay there
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to every process of a service
    connection = socket.socket(fileno=descriptor)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone: nobody is left to tell
        _Loop(connection, target).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
