"""What a request that runs is held to."""

import asyncio

import pytest

from lightship.engine import Event
from lightship.errors import Timeout
from lightship.serving.admission import Admission
from lightship.serving.ticket import Demand, Limits
from tests.serving.virtual import demand, is_empty, virtual


async def said(*events):
    """An engine's events: (seconds to wait, tokens, finish)."""
    for seconds, tokens, finish in events:
        await asyncio.sleep(seconds)
        yield Event(1, tuple(range(tokens)), (), finish)


@virtual
async def test_watched_events(clock):
    admission = Admission(Limits(blocks=10), clock=clock)
    async with await admission.enter(demand("a", 64, 64)) as ticket:
        async for _ in ticket.watch(said((2, 1, None), (1, 3, None), (0.5, 0, "stop"))):
            pass
    assert (ticket.ttft, ticket.tokens, ticket.finish, ticket.ended) == (2, 4, "stop", 3.5)
    assert is_empty(admission)


@virtual
async def test_first_token_deadline_counts_from_arrival(clock):
    admission = Admission(Limits(blocks=10, first_token_deadline=60), clock=clock)
    before = await admission.enter(demand("a", 320, 0))
    asyncio.get_running_loop().call_later(50, before.close)
    with pytest.raises(Timeout, match="first token"):
        async with await admission.enter(demand("a", 64, 64)) as ticket:
            assert ticket.queued == 50 and ticket.deadline == 60
            async for _ in ticket.watch(said((11, 1, None))):
                pass
    assert clock() == 60 and ticket.finish == "timeout" and is_empty(admission)


@virtual
async def test_waiting_for_an_engine_is_no_slow_reading(clock):
    """A prompt of 100 tokens, read in a second by the engine that came after half a minute."""
    admission = Admission(Limits(blocks=1000), prefill=100, clock=clock)
    for _ in range(30):
        async with await admission.enter(demand("a", 100, 5)) as ticket:
            await asyncio.sleep(30)
            ticket.begin()
            await asyncio.sleep(1)
            ticket.produced(1)
    assert admission.snapshot().prefill_speed == pytest.approx(100)


@virtual
async def test_what_an_engine_takes_with_it_does_not_count(clock):
    """Another one has all of it to do again."""
    admission = Admission(Limits(blocks=1000), clock=clock, prefill=100, decode=10)
    spent = []
    admission._rates.spend = lambda key, count: spent.append(count)

    async def written(count):
        await asyncio.sleep(0.9)  # and 0.1 s for the first token: 100 tokens read in a second
        for _ in range(count):
            await asyncio.sleep(0.1)
            ticket.produced(1)

    async with await admission.enter(demand("a", 100, 50)) as ticket:
        ticket.begin()
        await written(30)
        left, served = admission._left(ticket), admission._served["a"]
        assert left == pytest.approx(20 / 10)
        ticket.begin()
        assert ticket.tokens == 0 and ticket.reading and served - admission._served["a"] == 2 * 30
        assert admission._left(ticket) == pytest.approx(100 / 100 + 50 / 10)
        await written(50)
        ticket.finish = "length"
    assert ticket.tokens == 50 == sum(spent)


@virtual
async def test_what_needs_nothing_of_the_engine_takes_one_place(clock):
    admission = Admission(Limits(blocks=2, max_concurrent=2), clock=clock)
    scored = Demand("a", (500,) * 9, (0,) * 9, beside=True)
    assert (scored.blocks(32), scored.sequences, scored.prompt) == (0, 1, 4500)
    async with await admission.enter(scored) as first:
        async with await admission.enter(demand("a", 32, 32)):
            now = admission.snapshot()
            assert (now.sequences, now.blocks_used, now.waiting) == (2, 2, 0)
        first.finish = "length"
    assert is_empty(admission)


@virtual
async def test_what_generates_nothing_says_nothing_of_answers(clock):
    admission = Admission(Limits(blocks=1000), clock=clock)
    for output, usual in ((8, 4), (0, 4)):
        async with await admission.enter(demand("a", 100, output)) as ticket:
            ticket.produced(min(output, 4))
            ticket.finish = "length"
        assert admission._usual_output == usual


@virtual
async def test_who_reads_slowly_does_not_make_the_engine_look_slow(clock):
    """Ten tokens a second, of which the client takes one every ten seconds."""

    async def given():
        await asyncio.sleep(0.1)
        for place in range(200):
            yield Event(1, (5,), at=began + (place + 1) / 10)

    admission, began = Admission(Limits(blocks=1000), decode=10, clock=clock), clock()
    async with await admission.enter(demand("a", 64, 200)) as ticket:
        async for _ in ticket.watch(given()):
            await asyncio.sleep(10)
    assert admission.snapshot().decode_speed == pytest.approx(10) and ticket.ttft == pytest.approx(0.1)


@virtual
async def test_waiting_for_the_next_engine_is_no_slow_writing(clock):
    admission = Admission(Limits(blocks=1000), decode=10, clock=clock)
    async with await admission.enter(demand("a", 64, 200)) as ticket:
        for _ in range(20):
            ticket.begin()
            for _ in range(5):
                await asyncio.sleep(0.1)
                ticket.produced(1)
            await asyncio.sleep(30)
    assert admission.snapshot().decode_speed == pytest.approx(10)


@virtual
async def test_a_slow_end_is_fine_unless_there_is_a_total_deadline(clock):
    events = ((1, 1, None), (100, 1, None), (1, 0, "stop"))
    admission = Admission(Limits(blocks=10), clock=clock)
    async with await admission.enter(demand("a", 64, 64)) as ticket:
        assert len([event async for event in ticket.watch(said(*events))]) == 3 and ticket.deadline is None
    admission = Admission(Limits(blocks=10, total_deadline=90), clock=clock)
    begun = clock()
    with pytest.raises(Timeout, match="last token"):
        async with await admission.enter(demand("a", 64, 64)) as ticket:
            async for _ in ticket.watch(said(*events)):
                pass
    assert clock() - begun == 90 and ticket.tokens == 1


@virtual
async def test_leaving_closes_the_events(clock):
    closed = []

    async def events():
        try:
            async for each in said((1, 1, None), (1, 1, None)):
                yield each
        finally:
            closed.append(clock())

    admission = Admission(Limits(blocks=10), clock=clock)
    async with await admission.enter(demand("a", 64, 64)) as ticket:
        watched = ticket.watch(events())
        await anext(watched)
        await watched.aclose()
    assert closed == [1] and ticket.finish == "abort" and is_empty(admission)
