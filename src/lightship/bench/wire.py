"""HTTP/1.1 as a load generator needs it: one request on a raw socket, its answer piece by piece.

A full client costs several times more a token, and the generator often shares its cores with what it measures.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lightship.errors import UsageError

IDLE = 2.0  # seconds after which a connection is not used again: servers close idle ones, usually after 5 s
PIECE = 2**16


@dataclass(frozen=True)
class Place:
    """Where a server is. `path` stands before the API's own paths."""

    host: str
    port: int
    path: str = ""
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str) -> Place:
        """The place of `http://host[:port][/path]`; a `/v1` at its end is taken off. Raises `UsageError`."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{url!r} has no port that could be used: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server", hint="give it like http://127.0.0.1:8000")
        if parts.username is not None or parts.query:
            raise UsageError("the address of the server may hold neither a password nor a query",
                             hint="put the key into $LIGHTSHIP_KEY")  # fmt: skip
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), path, tls)

    @property
    def name(self) -> str:
        """host:port, as in the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0


class Answer:
    """The answer to one request: its head is read, its body still comes."""

    def __init__(self, status: int, headers: dict[str, str], connection: _Connection, door: Door) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self._door = door
        self._whole = False

    async def body(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `ConnectionError` or `asyncio.IncompleteReadError` where it breaks off."""
        reader = self._connection.reader
        length = self.headers.get("content-length")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            while (await reader.readuntil(b"\n")).strip():
                pass  # trailers
            self._whole = True
        elif length is not None:
            left = int(length)
            while left and (piece := await reader.read(min(left, PIECE))):
                left -= len(piece)
                yield piece
            if left:
                raise asyncio.IncompleteReadError(b"", left)
            self._whole = True
        else:  # ends with the connection, which therefore is not used again
            while piece := await reader.read(PIECE):
                yield piece

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.body()])

    def close(self) -> None:
        """Give the connection back where it can be used again, else close it."""
        reusable = self._whole and self.headers.get("connection", "").lower() != "close"
        self._door.give_back(self._connection, reusable)


@dataclass
class Door:
    """The way to a server: connections that are kept open between requests, or, without `keep_alive`, one each."""

    place: Place
    keep_alive: bool = True
    key: str | None = field(default=None, repr=False)
    opened: int = 0  # connections that were made
    _idle: list[_Connection] = field(default_factory=list)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        lines = [f"{method} {self.place.path}{path} HTTP/1.1", f"Host: {self.place.name}",
                 "Content-Type: application/json", f"Content-Length: {len(body)}"]  # fmt: skip
        if not self.keep_alive:
            lines.append("Connection: close")
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def send(self, request: bytes) -> Answer:
        """Send a request and read the head of its answer; `Answer.close` must be called. Raises `OSError` and
        `asyncio.IncompleteReadError`, and `ValueError` for what is not HTTP."""
        connection = self._kept() or await self._connect()
        try:
            connection.writer.write(request)
            head = await connection.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            return Answer(int(first.split(" ", 2)[1]), headers, connection, self)
        except BaseException as error:
            connection.writer.close()
            if isinstance(error, IndexError | asyncio.LimitOverrunError):
                raise ValueError("what came is not HTTP") from error
            raise

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if asyncio.get_running_loop().time() - connection.idle_since < IDLE and not connection.reader.at_eof():
                return connection
            connection.writer.close()
        return None

    async def _connect(self) -> _Connection:
        self.opened += 1
        host = self.place.host
        reader, writer = await asyncio.open_connection(host, self.place.port, ssl=self.place.tls)
        return _Connection(reader, writer)

    def give_back(self, connection: _Connection, reusable: bool) -> None:
        """Keep a connection, or close it."""
        if reusable and self.keep_alive:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.writer.close()

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().writer.close()


async def events(answer: Answer) -> AsyncIterator[bytes]:
    """The data of the server-sent events of an answer."""
    rest = b""
    async for piece in answer.body():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()
