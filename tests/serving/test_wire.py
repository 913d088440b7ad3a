"""The messages between API and engine process: whole again on the other side, bounded, and nothing else is accepted."""

import asyncio
import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError
from lightship.serving import wire

ORDERS = [
    wire.Load("/some/folder", EngineSettings(kv_cache_gb=2, threads=3)),
    wire.Submit(7, [0, 2**31, 5], GenerationParams(max_tokens=3, seed=9, stop_token_ids=(4, 5), logprobs=True)),
    wire.Cancel(7),
]
REPLIES = [
    wire.Ready({"context": 5, "batching": "none"}),
    wire.Failed("RuntimeError: no"),
    wire.Refused(7, "too long", "prompt", None, 400),
    wire.Gained([Event(7, (1, 2), (-0.5, float("-inf")), "length")]),
    wire.Progress(3, 4, True, {"running": 2}),
]


def read(data):
    """The first message in `data`, after which the sender ends."""

    async def run():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await wire.read(reader)

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_orders_arrive_in_whatever_pieces(size):
    data, buffer, found = b"".join(wire.frame(order) for order in ORDERS), bytearray(), []
    for start in range(0, len(data), size):
        buffer += data[start : start + size]
        found += wire.split(buffer)
    assert found == ORDERS and not buffer


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_replies_arrive(reply):
    assert read(wire.frame(reply)) == reply


def test_messages_are_bounded_on_both_sides(monkeypatch):
    monkeypatch.setattr(wire, "FRAME_LIMIT", 100)
    with pytest.raises(EngineError, match="at most 100"):
        wire.frame(wire.Failed("x" * 101))
    with pytest.raises(EngineDied, match="cannot be read"):
        read(wire.HEADER.pack(101) + b"x" * 101)
    with pytest.raises(ValueError, match="a frame of 101 bytes"):
        wire.split(bytearray(wire.HEADER.pack(101)))


def test_orders_are_no_replies():
    with pytest.raises(EngineDied, match="cannot be read"):
        read(wire.frame(ORDERS[2]))
    with pytest.raises(msgspec.ValidationError):
        wire.split(bytearray(wire.frame(REPLIES[0])))


@given(some.binary(max_size=60), some.integers(0, 60), some.integers(0, 255))
def test_bytes_that_are_no_message_are_the_death_of_their_sender(noise, place, value):
    """Noise alone, and a true message with one byte changed: a reply or `EngineDied`, nothing else comes out."""
    true = bytearray(msgspec.msgpack.encode(REPLIES[3]))
    true[place % len(true)] = value
    for body in (noise, bytes(true)):
        with contextlib.suppress(EngineDied):
            assert isinstance(read(wire.HEADER.pack(len(body)) + body), wire.Reply)
