"""Grammars are compiled in a process of their own, under limits, before the engine sees them: there one that is wrong
ends the engine with every answer that runs in it, and one that is costly stops them all."""

from __future__ import annotations

import asyncio
import hashlib
import re
import resource
import signal
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightship.engine import Grammar
from lightship.errors import EngineDied, Overloaded, RequestError
from lightship.find import find
from lightship.serving.child import Child, ChildFailed, answer

MOST_BYTES = 512 * 2**10  # of a grammar
SECONDS = 3  # of processor time for one grammar; as long stands the engine still when it compiles it
WALL = 10.0  # seconds for one grammar, other processes of a busy machine included
MEMORY = 1 << 30  # bytes that compiling may take on top of what the process has
KEPT = 64 * 2**20  # bytes that a compiled grammar may take: the engine keeps each as long as it lives
USES = 100  # grammars until a new process, since the compiler here keeps them too
REMEMBERED = 1000  # verdicts
MOST_WAITING = 8  # grammars of one key that wait to be compiled


class Compiles(Protocol):
    """What a target's `open_compiler(folder)` gives."""

    def compile(self, grammar: Grammar) -> None:
        """Raises `RuntimeError` for a grammar that the engine could not use."""
        ...


@dataclass
class _Line:
    """The grammars of one key: how many requests wait for each."""

    waiting: Counter[str] = field(default_factory=Counter)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Grammars:
    """The parent's side. A target without `open_compiler` has an engine without grammars."""

    def __init__(self, target: str, folder: Path, cores: frozenset[int] | None = None) -> None:
        """`cores`: as of `Child`."""
        self.supported = hasattr(find("targets", target), "open_compiler")
        self._child = Child(
            "lightship.serving.grammar", [target, str(folder)], folder, USES, quiet=True, cores=cores,
            MALLOC_ARENA_MAX="1",
        )  # fmt: skip  # what the compiler prints may hold the client's text
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()
        self._lines: dict[str, _Line] = {}

    async def check(self, grammar: Grammar, param: str, key: str = "") -> None:
        """Raise `RequestError` naming `param` for a grammar that cannot be used, or costs too much. Each `key` has one
        at a time in the line of all, so that nobody waits for all that another sent; raises `Overloaded` when too many
        others of it wait behind that."""
        if not self.supported:
            raise RequestError("this model's engine cannot hold an answer to a grammar; serve it with OpenVINO",
                               param, "unsupported_parameter")  # fmt: skip
        if len(grammar.text) > MOST_BYTES:
            raise RequestError(f"the grammar exceeds {MOST_BYTES} bytes", param, "schema_too_large")
        digest = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).hexdigest()
        if digest not in self._verdicts:
            async with self._line(key, digest):
                if digest not in self._verdicts:  # it may have been the one before
                    self._verdicts[digest] = await self._verdict(grammar)
        self._verdicts.move_to_end(digest)
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if (reason := self._verdicts[digest]) is not None:
            raise RequestError(reason, param, "invalid_schema")

    @asynccontextmanager
    async def _line(self, key: str, digest: str) -> AsyncIterator[None]:
        line = self._lines.setdefault(key, _Line())
        if digest not in line.waiting and len(line.waiting) >= MOST_WAITING:
            wait = SECONDS * MOST_WAITING
            raise Overloaded(f"too many schemas wait to be compiled; try again in {wait} s", wait)
        line.waiting[digest] += 1
        try:
            async with line.turn:
                yield
        finally:
            line.waiting -= Counter([digest])
            if not line.waiting:
                del self._lines[key]

    async def _verdict(self, grammar: Grammar) -> str | None:
        try:
            reply = await self._child.ask({"kind": grammar.kind, "text": grammar.text}, WALL)
        except ChildFailed as error:
            if self._child.closed:
                raise EngineDied("the server is about to stop serving this model") from None
            if error.code is None or error.code == -signal.SIGKILL:  # which says nothing of the grammar
                raise EngineDied(f"the grammar could not be checked: {error}") from error
            return f"it is too costly: compiling it took more than {SECONDS} s or {MEMORY >> 20} MiB"
        reason: str | None = reply["error"]
        return reason

    async def close(self) -> None:
        """End the process."""
        await self._child.close()


def _load(target: str, folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    compiler: Compiles = find("targets", target).open_compiler(folder)
    compiler.compile(Grammar("ebnf", 'root ::= "a"'))  # what the first one costs is not the client's

    def reply(question: dict[str, Any]) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS)
        whole, resident = _memory()
        _limit(resource.RLIMIT_AS, whole + MEMORY)
        try:
            compiler.compile(Grammar(question["kind"], question["text"]))
        except RuntimeError as error:
            return {"error": _cleaned(str(error))}
        taken = _memory()[1] - resident
        return {"error": f"it is too costly: compiled it takes {taken >> 20} MiB" if taken > KEPT else None}

    return reply


def _limit(what: int, value: int) -> None:
    """Lower the soft limit, which the next question may raise again."""
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def _memory() -> tuple[int, int]:
    """Bytes of this process: its address space, and what of it is in memory."""
    whole, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(whole) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _cleaned(reason: str) -> str:
    """The compiler's message without times, places in its source, and the client's text."""
    lines = [line for line in reason.splitlines() if line.strip() and not line.startswith("Exception from")]
    line = re.sub(r"^\[[\d:]+\] \S+:\d+: |^.*?Check failed: .*? is false: ", "", lines[0] if lines else "")
    return "it cannot be compiled: " + line.partition("{")[0].strip()[:200]


if __name__ == "__main__":
    answer(int(sys.argv[1]), sys.argv[2], lambda: _load(sys.argv[3], Path(sys.argv[4])))
