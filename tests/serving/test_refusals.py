"""Who is refused for what is there already: queue, rates, measured speeds."""

import asyncio

import pytest

from lightship.errors import Overloaded, RequestError, Timeout
from lightship.serving.admission import Admission
from lightship.serving.rates import KeyRates, Speed
from lightship.serving.ticket import Demand, Limits
from tests.serving.virtual import asking, demand, is_empty, settled, virtual


@virtual
async def test_retry_after_is_the_work_ahead_at_the_measured_speed(clock):
    admission = Admission(Limits(blocks=10, max_queue=1, max_concurrent=1), prefill=100, decode=10, clock=clock)
    await admission.enter(demand("a", 200, 100))  # 2 s + 10 s
    waits = asking(admission, prompt=100, output=50)  # 1 s + 5 s
    await settled()
    with pytest.raises(Overloaded, match="18 s") as caught:
        await admission.enter(demand("a", 32, 0))
    assert caught.value.retry_after == 18 and caught.value.code is None
    assert caught.value.reason == "queue_full" and caught.value.http_status == 429
    waits.cancel()
    await settled()


@virtual
async def test_retry_after_follows_what_was_measured_and_is_bounded(clock):
    limits = Limits(blocks=1000, max_queue=0, max_concurrent=1)
    admission = Admission(limits, prefill=1000, decode=1000, clock=clock)
    for _ in range(60):  # it turns out: 10 tokens/s in the prompt, 1 afterwards, and answers are short
        async with await admission.enter(demand("a", 400, 2000)) as ticket:
            await asyncio.sleep(40)
            ticket.produced(1)
            await asyncio.sleep(99)
            ticket.produced(99)
            ticket.finish = "stop"
    now = admission.snapshot()
    assert now.prefill_speed == pytest.approx(10, rel=0.1) and now.decode_speed == pytest.approx(1, rel=0.1)
    await admission.enter(demand("a", 400, 2000))
    with pytest.raises(Overloaded) as caught:
        await admission.enter(demand("a", 400, 2000))
    assert caught.value.retry_after == pytest.approx(140, rel=0.1)  # not 2 040: nobody writes that much
    slow = Admission(limits, prefill=0.001, clock=clock)
    await slow.enter(demand("a", 400, 2000))
    with pytest.raises(Overloaded) as caught:
        await slow.enter(demand("a", 400, 2000))
    assert caught.value.retry_after == 600


@virtual
async def test_requests_a_minute(clock):
    admission = Admission(Limits(blocks=10), clock=clock)
    limited = demand("a", 32, 0, requests_per_minute=7)
    for _ in range(7):
        (await admission.enter(limited)).close()
    with pytest.raises(Overloaded, match="7 requests a minute") as caught:
        await admission.enter(limited)
    assert caught.value.retry_after == 9 and caught.value.reason == "requests_per_minute"  # 60 / 7 = 8.57
    assert (caught.value.code, caught.value.kind) == ("rate_limit_exceeded", "requests")
    (await admission.enter(demand("b", 32, 0, requests_per_minute=7))).close()
    (await admission.enter(demand("c", 32, 0))).close()
    await asyncio.sleep(8)
    with pytest.raises(Overloaded):
        await admission.enter(limited)
    await asyncio.sleep(1)
    (await admission.enter(limited)).close()
    with pytest.raises(Overloaded):
        await admission.enter(limited)
    await asyncio.sleep(3600)  # no more than a minute's worth is kept
    for _ in range(7):
        (await admission.enter(limited)).close()
    with pytest.raises(Overloaded):
        await admission.enter(limited)
    assert is_empty(admission)


@virtual
async def test_tokens_a_minute_with_what_was_produced_paid_afterwards(clock):
    admission = Admission(Limits(blocks=100), clock=clock)
    limited = demand("a", 60, 1000, tokens_per_minute=120)
    async with await admission.enter(limited) as ticket:
        ticket.produced(180)  # a debt of 120
    with pytest.raises(Overloaded, match="120 tokens a minute") as caught:
        await admission.enter(limited)
    assert caught.value.retry_after == 90 and caught.value.reason == "tokens_per_minute"
    await asyncio.sleep(89)
    with pytest.raises(Overloaded):
        await admission.enter(limited)
    await asyncio.sleep(1)
    (await admission.enter(limited)).close()
    with pytest.raises(RequestError, match="121 tokens; this key may use 120"):
        await admission.enter(demand("a", 121, 0, tokens_per_minute=120))
    assert is_empty(admission)


@virtual
async def test_a_request_that_never_ran_costs_no_tokens(clock):
    admission = Admission(Limits(blocks=10, max_queue=1, first_token_deadline=5), clock=clock)
    runs = await admission.enter(demand("other", 320, 0))
    limited = demand("a", 100, 0, tokens_per_minute=100)
    with pytest.raises(Timeout):
        await admission.enter(limited)
    left = asyncio.create_task(admission.enter(limited))
    await settled()
    left.cancel()
    await settled()
    waits = asking(admission, key="b")
    await settled()
    with pytest.raises(Overloaded, match="too many requests wait"):
        await admission.enter(limited)
    waits.cancel()
    runs.close()
    (await admission.enter(limited)).close()


@virtual
async def test_a_full_queue_does_not_use_up_the_requests_of_a_key(clock):
    admission = Admission(Limits(blocks=10, max_queue=0), clock=clock)
    runs = await admission.enter(demand("other", 320, 0))
    limited = demand("a", 32, 0, requests_per_minute=1)
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            await admission.enter(limited)
        assert caught.value.reason == "queue_full"
    runs.close()
    (await admission.enter(limited)).close()
    with pytest.raises(Overloaded) as caught:
        await admission.enter(limited)
    assert caught.value.reason == "requests_per_minute" and is_empty(admission)


@virtual
async def test_waiting_too_long_does_not_use_up_the_requests_of_a_key_but_leaving_does(clock):
    admission = Admission(Limits(blocks=10, first_token_deadline=5), clock=clock)
    runs = await admission.enter(demand("other", 320, 0))
    limited = demand("a", 32, 0, requests_per_minute=1)
    with pytest.raises(Timeout):
        await admission.enter(limited)
    left = asyncio.create_task(admission.enter(limited))  # the one of this minute was given back
    await settled()
    left.cancel()
    await settled()
    with pytest.raises(Overloaded) as caught:
        await admission.enter(limited)
    assert caught.value.reason == "requests_per_minute"
    runs.close()


def test_rates_follow_a_change_of_limits():
    rates = KeyRates(lambda: 0.0)
    rates.take("a", 10, None, 100)
    rates.take("a", 10, None, None)
    with pytest.raises(Overloaded) as caught:
        rates.take("a", 10, None, 10)
        rates.take("a", 10, None, 10)
    assert caught.value.retry_after == 60


def test_speed_forgets():
    speed = Speed(1000, half_life=100)
    assert speed.per_second == pytest.approx(1000)
    for _ in range(1000):
        speed.observe(1, 0.5)
    assert speed.per_second == pytest.approx(2, rel=0.01)


async def ran(admission, seconds, output):
    async with await admission.enter(demand("a", 1, output)) as ticket:
        ticket.produced(1)
        await asyncio.sleep(seconds)
        ticket.produced(output - 1)
        ticket.finish = "stop"


@virtual
async def test_an_encoder_is_as_fast_as_it_reads_all_rows(clock):
    """Its first token comes when all rows are read: a full pool of batches is soon done, and a single row waits."""
    admission = Admission(Limits(blocks=10**6, max_concurrent=512), clock=clock)
    rows = Demand("a", (200,) * 256, (0,) * 256)

    async def batch():
        async with await admission.enter(rows) as ticket:
            await asyncio.sleep(1)
            ticket.first_token()
            ticket.finish = "stop"

    for _ in range(10):
        await batch()
    assert admission.snapshot().prefill_speed == pytest.approx(256 * 200, rel=0.1)
    many = [asyncio.create_task(batch()) for _ in range(3)]
    one = asking(admission, prompt=32)
    await asyncio.gather(*many)
    (await one).close()
    assert is_empty(admission)


@virtual
async def test_who_would_wait_too_long_is_refused_at_once(clock):
    limits = Limits(blocks=100, max_concurrent=1, first_token_deadline=30)
    admission = Admission(limits, prefill=100, decode=10, clock=clock)
    asked = {"prompt": 100, "output": 51}  # 1 s + 5.1 s
    unknown = [asking(admission, **asked) for _ in range(4)]
    await settled()
    assert [task.done() for task in unknown] == [True, False, False, False]  # nothing has ended yet: all may try
    for task in unknown:
        task.cancel()
    (await unknown[0]).close()
    await settled()
    await ran(admission, 5, 51)
    runs, waits = await admission.enter(demand("a", 100, 51)), [asking(admission, **asked) for _ in range(2)]
    await settled()
    charged = {"requests_per_minute": 1000, "tokens_per_minute": 1000}
    with pytest.raises(Overloaded, match="first token would take about 20 s; try again in 19 s") as caught:
        await admission.enter(demand("a", 100, 51, **charged))
    assert (caught.value.reason, caught.value.http_status, caught.value.code) == ("queue_slow", 429, None)
    assert admission._rates._tokens["a"].missing(1000, 1000) == 0  # it cost nothing
    assert admission._rates._requests["a"].missing(1000, 1000) == 0
    other = asking(admission, key="b", **asked)  # goes before the second of a
    await settled()
    assert not other.done() and admission.snapshot().waiting_by_key == {"a": 2, "b": 1}
    runs.close()
    for task in (waits[0], other, waits[1]):
        (await task).close()
    assert is_empty(admission)


@virtual
async def test_the_first_that_ends_makes_room_however_long_the_others_take(clock):
    """Ten answers run, the last of which began just now: one ends every ten seconds."""
    limits = Limits(blocks=10_000, max_concurrent=10, first_token_deadline=61)
    admission = Admission(limits, prefill=1000, decode=10, clock=clock)
    await ran(admission, 100, 1000)
    running = [await admission.enter(demand("a", 1, 1000)) for _ in range(10)]
    for place, ticket in enumerate(running):
        ticket.produced(1)
        ticket.tokens = 100 * place
    waits = asking(admission, output=1000)
    await settled()
    assert not waits.done() and admission.snapshot().waiting == 1  # though 55 s are left of each on the average
    second, third = asking(admission, output=1000), asking(admission, output=1000)
    fourth = asking(admission, output=1000)
    await settled()
    assert not second.done() and isinstance(fourth.exception(), Overloaded)  # 40 s
    assert "about 41 s" in fourth.exception().message
    for ticket in running:
        ticket.close()
    for task in (waits, second, third):
        (await task).close()
    assert is_empty(admission)


@virtual
async def test_behind_one_that_fills_the_cache_many_begin_together(clock):
    admission = Admission(Limits(blocks=100, first_token_deadline=60), prefill=1000, decode=10, clock=clock)
    await ran(admission, 10, 101)
    big = await admission.enter(demand("a", 3000, 200))
    small = [asking(admission, prompt=32, output=101) for _ in range(20)]  # 10 s each
    await settled()
    assert admission.snapshot().waiting == 20
    big.close()
    for task in small:
        (await task).close()
    assert is_empty(admission)
