"""What API and engine process say to each other: msgpack in bounded frames over a socket pair, never pickle.

A frame is 4 bytes of length, big-endian, and one message. The pair is inherited by the child and has no path, so no
other process can connect to it: stricter than a socket file of mode 0600. Both sides check what they read against the
types below, and nothing else is ever constructed.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError

HEADER = struct.Struct(">I")
FRAME_LIMIT = 64 * 2**20  # bytes of a message
ENDED = "the engine process ended"


# ── API → engine ────────────────────────────────────────────────────────────


class Load(msgspec.Struct, tag="load"):
    """Open this runtime folder; the first message, and the only one of its kind."""

    folder: str
    settings: EngineSettings


class Submit(msgspec.Struct, tag="submit"):
    """Generate; `id` is the sender's."""

    id: int
    tokens: list[int]
    params: GenerationParams


class Cancel(msgspec.Struct, tag="cancel"):
    """Give request `id` up before the next step."""

    id: int


# ── Engine → API ────────────────────────────────────────────────────────────


class Ready(msgspec.Struct, tag="ready"):
    """The engine is loaded."""

    stats: dict[str, Any]


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot be loaded or is dead; the last message of this process."""

    message: str


class Refused(msgspec.Struct, tag="refused"):
    """The engine does not take request `id`; the fields of a `RequestError`."""

    id: int
    message: str
    param: str | None
    code: str | None
    status: int


class Gained(msgspec.Struct, tag="gained"):
    """What requests got in a step, under the ids that the API gave them."""

    events: list[Event]


class Progress(msgspec.Struct, tag="progress"):
    """Steps have returned, with or without tokens, or all work is done: how many `steps`, how many messages `handled`,
    whether the engine is `busy`, and its figures."""

    steps: int
    handled: int
    busy: bool
    stats: dict[str, Any]


Order = Load | Submit | Cancel
Reply = Ready | Failed | Refused | Gained | Progress
ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def frame(message: Order | Reply) -> bytes:
    """One message on the wire. Raises `EngineError` for one that is too long."""
    body = msgspec.msgpack.encode(message)
    if len(body) > FRAME_LIMIT:
        raise EngineError(f"a message of {len(body)} bytes; between API and engine at most {FRAME_LIMIT} are sent")
    return HEADER.pack(len(body)) + body


async def read(reader: asyncio.StreamReader) -> Reply:
    """The engine's next message. Raises `EngineDied` when there is none, or when it is not one of ours."""
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if length > FRAME_LIMIT:
            raise EngineDied(f"the engine process sent what cannot be read: a frame of {length} bytes")
        return REPLIES.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EngineDied(ENDED) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineDied(f"the engine process sent what cannot be read: {error}") from error


def split(buffer: bytearray) -> list[Order]:
    """Take the whole messages off `buffer`. Raises `ValueError` for what is none."""
    found: list[Order] = []
    while len(buffer) >= HEADER.size:
        (length,) = HEADER.unpack_from(buffer)
        if length > FRAME_LIMIT:
            raise ValueError(f"a frame of {length} bytes")
        if len(buffer) < HEADER.size + length:
            break
        found.append(ORDERS.decode(buffer[HEADER.size : HEADER.size + length]))
        del buffer[: HEADER.size + length]
    return found
