"""A process beside the engine that answers one question at a time: what may fail or take long does it there.

Questions and answers are lines of JSON over a socket pair. The child starts with the first question.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightship.errors import EngineError
from lightship.serving.unchanged import Unchanged

JSON = dict[str, Any]
LINE_LIMIT = 64 * 2**20
LOADING = 300.0  # seconds that a child may take to start
ENDING = 5.0  # seconds that one may take to end which has closed its socket


class ChildFailed(Exception):
    """The child ended, or took too long and was ended. `code`: how it ended by itself over a question (as of `Popen`);
    None where it did not start, or was ended."""

    def __init__(self, why: str, code: int | None = None) -> None:
        super().__init__(why)
        self.code = code


class Child:
    """`python -m <module> <socket> <cores> <arguments…>`, the parent's side. After `uses` questions a new one is
    started. It is held to `cores`, None for all that this process may use. It reads `folder`, which must stay as it is
    now."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        uses: int | None = None,
        quiet: bool = False,
        cores: frozenset[int] | None = None,
        **environment: str,
    ) -> None:
        self._command = [sys.executable, "-P", "-m", module]
        self._cores = ",".join(map(str, sorted(cores or ())))
        self._arguments, self._uses, self._quiet = list(arguments), uses, quiet
        self._environment = {**os.environ, **environment}
        self._verified = Unchanged.of([folder])
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()
        self._used = 0
        self.closed = False
        self.memory = 0  # bytes that it had in use when it was ready

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def ask(self, question: JSON, timeout: float | None = None) -> JSON:
        """The answer; raises `ChildFailed`. Whoever stops waiting for its turn is gone from the line; after that the
        child finishes what it was asked, though nobody may be left to hear it."""
        await self._turn.acquire()
        if self.closed:
            self._turn.release()
            raise ChildFailed("it was closed")
        asking = asyncio.create_task(self._ask(question, timeout))
        asking.add_done_callback(self._asked)
        return await asyncio.shield(asking)

    def _asked(self, task: asyncio.Task[JSON]) -> None:
        self._turn.release()
        if not task.cancelled():
            task.exception()  # seen, whoever else is left to see it

    async def _ask(self, question: JSON, timeout: float | None) -> JSON:
        if self.pid is None or (self._uses is not None and self._used >= self._uses):
            await self._stop()
            await self._start()
        self._used += 1
        return await self._exchange(question, timeout)

    async def _start(self) -> None:
        try:
            self._verified.check()
        except (EngineError, OSError) as error:
            raise ChildFailed(str(error)) from error
        ours, theirs = socket.socketpair()
        with theirs:
            # A process group of its own: Ctrl-C in the terminal reaches the parent only. Libraries print to stderr.
            try:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno()), self._cores, *self._arguments], pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0, env=self._environment,
                    stderr=subprocess.DEVNULL if self._quiet else None,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise ChildFailed(f"it could not be started: {error}") from error
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_LIMIT)
        self._used = 0
        self.memory = (await self._exchange(None, LOADING))["memory"]

    async def _exchange(self, question: JSON | None, timeout: float | None) -> JSON:
        assert self._reader is not None and self._writer is not None
        try:
            async with asyncio.timeout(timeout):
                if question is not None:
                    self._writer.write(json.dumps(question).encode() + b"\n")
                line = await self._reader.readline()
        except TimeoutError as error:
            await self._stop()
            raise ChildFailed("it took too long") from error
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            code = await self._stop(ENDING)
            raise ChildFailed("it ended", None if question is None else code)
        answer: JSON = json.loads(line)
        return answer

    async def _stop(self, grace: float = 0.0) -> int | None:
        """End it, unless it does so by itself within `grace` seconds; how it ended."""
        code = None
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            if grace:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._process.wait, grace)
            self._process.kill()
            code = await asyncio.to_thread(self._process.wait)
        self._process = self._reader = self._writer = None
        return code

    async def close(self) -> None:
        """End the child, also one that is at work; no other is started."""
        self.closed = True
        if self._process is not None:
            self._process.kill()  # whoever waits for it learns that it ended
        async with self._turn:
            await self._stop()


def answer(descriptor: int, cores: str, load: Callable[[], Callable[[JSON], JSON]]) -> None:
    """The child's side: `load`, say so, and answer each question until the parent is gone. `cores`: as in `Child`, with
    commas between; empty for all."""
    if cores:  # before the runtime is loaded, as with engines
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to every process of a service
    reply = load()
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        connection.sendall(json.dumps({"memory": pages * resource.getpagesize()}).encode() + b"\n")
        for line in connection.makefile("rb"):
            connection.sendall(json.dumps(reply(json.loads(line))).encode() + b"\n")
