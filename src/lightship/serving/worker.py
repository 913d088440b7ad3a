"""The engine in a process of its own: its steps hold the interpreter lock, and when it dies the API must not.

Parent and child talk over a socket pair in msgpack frames (4 bytes length, then the message), never pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from lightship.engine import Engine, EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError, LightshipError, RequestError
from lightship.find import find

log = logging.getLogger("lightship.serving")
HEADER = struct.Struct(">I")
FRAME_LIMIT = 64 * 2**20


def frame(message: dict[str, Any]) -> bytes:
    """One message on the wire."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


# ── The parent's side ───────────────────────────────────────────────────────


class Worker:
    """A child process with one engine: `load`, `start`, then `generate`; when it dies every stream raises `EngineDied`.

    `spawn` may come first, to let it import its runtime while the parent makes sure of what it will load.
    """

    def __init__(self, target: str, settings: EngineSettings) -> None:
        self._target, self._settings = target, settings
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._streams: dict[int, asyncio.Queue[Event | LightshipError]] = {}
        self._next_id = 0
        self.ready = False
        self.failure: str | None = None  # why the engine died, when it could still say so
        self.stats: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        """Whether the child runs, loading or ready."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Start the child, which imports the runtime of its target and waits. It ends when this process does."""
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "lightship.serving.worker", str(theirs.fileno()), self._target]
        # A process group of its own: Ctrl-C in the terminal reaches the parent only. Libraries print to stderr.
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, process_group=0
        )
        theirs.close()

    def load(self, folder: Path) -> None:
        """Let the child load the runtime folder, once it may be trusted."""
        if self._socket is None:
            self.spawn()
        assert self._socket is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: `start` tells
            self._socket.sendall(frame({"folder": str(folder), "settings": asdict(self._settings)}))

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
            first = await _read(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EngineDied("the engine process ended while loading the model") from error
        if first["type"] != "ready":
            raise EngineError(f"the engine cannot be loaded: {first['message']}")
        self.stats, self.ready = first["stats"], True
        self._reading = asyncio.create_task(self._listen(reader))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            await self._dispatch(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the child ended
        except Exception:
            log.exception("the engine process sent what cannot be read")
        finally:
            self.ready = False
            reason = f"the engine process ended: {self.failure}" if self.failure else "the engine process ended"
            for stream in self._streams.values():
                stream.put_nowait(EngineDied(reason))

    async def _dispatch(self, reader: asyncio.StreamReader) -> None:
        while True:
            message = await _read(reader)
            if message["type"] == "failed":
                self.failure = message["message"]
                continue
            stream = self._streams.get(message["id"])
            if stream is None:
                continue  # cancelled meanwhile
            if message["type"] == "refused":
                stream.put_nowait(
                    RequestError(message["message"], message["param"], message["code"], message["status"])
                )
            else:
                stream.put_nowait(Event(message["id"], tuple(message["tokens"]), tuple(message["logprobs"]),
                                        message["finish"], message["error"]))  # fmt: skip

    async def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """The events of one request, the last with its finish reason. Leaving early cancels the request."""
        if not self.ready or self._writer is None:
            raise EngineDied("the engine is not running")
        self._next_id += 1
        request_id, finished = self._next_id, False
        stream = self._streams[request_id] = asyncio.Queue()
        self._writer.write(
            frame({"type": "submit", "id": request_id, "tokens": list(tokens), "params": asdict(params)})
        )
        try:
            while not finished:
                got = await stream.get()
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
                self._writer.write(frame({"type": "cancel", "id": request_id}))

    async def recovered(self, timeout: float) -> None:
        """Raises `EngineDied`: nobody starts a worker again."""
        raise EngineDied(f"the engine process ended: {self.failure}" if self.failure else "the engine process ended")

    async def close(self) -> None:
        """End the child."""
        self.ready = False
        if self._writer is not None:
            self._writer.close()  # the child ends when its socket does
        elif self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, 5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._reading is not None:
            self._reading.cancel()


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    message: dict[str, Any] = msgspec.msgpack.decode(await reader.readexactly(length))
    return message


# ── The child's side ────────────────────────────────────────────────────────


class _Loop:
    """Reads requests, steps the engine, sends events."""

    def __init__(self, connection: socket.socket, target: str) -> None:
        self._connection, self._target = connection, target
        self._buffer = bytearray()
        self._outer: dict[int, int] = {}  # the engine's id → the parent's

    def run(self) -> None:
        """Until the parent closes the socket."""
        engine = self._load()
        while engine is not None:
            for message in self._messages(wait=not engine.busy()):
                if message is None:
                    engine.close()
                    return
                self._handle(engine, message)
            if engine.busy():
                try:
                    events = engine.step()
                except Exception as error:  # the engine is dead, and this process with it
                    self._fail(error)
                    raise
                self._send_events(events)

    def _load(self) -> Engine | None:
        try:
            target = find("targets", self._target)
            getattr(target, "preload", lambda: None)()
            arguments = next(iter(self._messages(wait=True)))
            if arguments is None:
                return None
            engine: Engine = target.open(Path(arguments["folder"]), EngineSettings(**arguments["settings"]))
        except Exception as error:  # whatever the runtime raises, the parent must hear of it
            self._fail(error)
            return None
        self._connection.sendall(frame({"type": "ready", "stats": engine.stats()}))
        return engine

    def _fail(self, error: Exception) -> None:
        self._connection.sendall(frame({"type": "failed", "message": f"{type(error).__name__}: {error}"[:2000]}))

    def _messages(self, wait: bool) -> list[dict[str, Any] | None]:
        """Whole messages that have arrived; None stands for the closed socket. Blocks for the first when `wait`."""
        found: list[dict[str, Any] | None] = []
        while not found:
            if select.select([self._connection], [], [], None if wait else 0)[0]:
                try:
                    data = self._connection.recv(1 << 20)
                except ConnectionError:
                    data = b""
                if not data:
                    return [None]
                self._buffer += data
            found.extend(self._whole())
            if not wait:
                break
        return found

    def _whole(self) -> list[dict[str, Any]]:
        found = []
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > FRAME_LIMIT:
                raise ValueError(f"a frame of {length} bytes")
            if len(self._buffer) < HEADER.size + length:
                break
            found.append(msgspec.msgpack.decode(bytes(self._buffer[HEADER.size : HEADER.size + length])))
            del self._buffer[: HEADER.size + length]
        return found

    def _handle(self, engine: Engine, message: dict[str, Any]) -> None:
        outer = message["id"]
        if message["type"] == "cancel":
            for inner, known in list(self._outer.items()):
                if known == outer:
                    engine.cancel(inner)
                    del self._outer[inner]
            return
        params = msgspec.convert(message["params"], GenerationParams)
        try:
            self._outer[engine.submit(message["tokens"], params)] = outer
        except LightshipError as error:
            self._connection.sendall(frame({"type": "refused", "id": outer, "message": error.message,
                                            "param": getattr(error, "param", None),
                                            "code": getattr(error, "code", None),
                                            "status": error.http_status}))  # fmt: skip

    def _send_events(self, events: list[Event]) -> None:
        frames = []
        for event in events:
            outer = self._outer.get(event.request_id)
            if outer is None:
                continue  # cancelled
            if event.finish_reason is not None:
                del self._outer[event.request_id]
            frames.append(frame({"type": "event", "id": outer, "tokens": event.token_ids, "logprobs": event.logprobs,
                                 "finish": event.finish_reason, "error": event.error}))  # fmt: skip
        if frames:
            self._connection.sendall(b"".join(frames))


def main(descriptor: int, target: str) -> None:
    """The child: signals to stop belong to the parent, which lets streams finish and then closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to every process of a service
    connection = socket.socket(fileno=descriptor)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone: nobody is left to tell
        _Loop(connection, target).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
