"""Admission under a virtual clock: an event loop that jumps to its next timer instead of sleeping, so that minutes of
traffic take milliseconds and every run of a test is the same."""

import asyncio
import selectors
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from lightship.engine import Event
from lightship.errors import Overloaded, RequestError, Timeout, UsageError
from lightship.serving.admission import Admission
from lightship.serving.rates import KeyRates, Speed
from lightship.serving.ticket import Demand, Limits


class Jumping(selectors.DefaultSelector):
    """Waits for nothing: time passes at once."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everyone waits and nobody will wake: a lost wake-up"
        self.now += max(0.0, timeout)
        return super().select(0)


def virtually(main):
    """Run the coroutine function `main` in virtual time; it is given the clock."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop.time))


def virtual(test):
    """A test that is a coroutine function of the clock."""

    def run():
        virtually(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def demand(key, prompt, output, sequences=1, **rates):
    """`sequences` choices of one prompt."""
    return Demand(key, (prompt,), (output,), sequences, **rates)


async def settled():
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def asking(admission, key="a", prompt=32, output=0, **more):
    return asyncio.create_task(admission.enter(demand(key, prompt, output, **more)))


def blocks(count, **more):
    """A prompt of `count` blocks."""
    return {"prompt": 32 * count, **more}


def is_empty(admission):
    now = admission.snapshot()
    assert (now.running, now.sequences, now.blocks_used, now.waiting, now.waiting_by_key) == (0, 0, 0, 0, {})
    assert admission._long_blocks == 0
    return True


# ── One rule at a time ──────────────────────────────────────────────────────


def test_the_worst_case_in_blocks():
    assert demand("a", 1, 0).blocks(32) == 1
    assert demand("a", 32, 0).blocks(32) == 1
    assert demand("a", 32, 1).blocks(32) == 2
    assert demand("a", 30, 5, sequences=3).blocks(32) == 6
    several = Demand("a", (30, 100), (5, 1), choices=2)
    assert (several.blocks(32), several.sequences, several.prompt) == (2 * (2 + 4), 4, 130)


@pytest.mark.parametrize("bad", [{"blocks": 0}, {"max_concurrent": 0}, {"max_queue": -1}, {"total_deadline": 0}])
def test_limits_that_cannot_be(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Limits(**{"blocks": 5, **bad})


@virtual
async def test_what_never_fits_is_refused_with_its_numbers(clock):
    admission = Admission(Limits(blocks=10, max_concurrent=4), clock=clock)
    with pytest.raises(RequestError, match=r"100 prompt tokens and up to 221 .* 11 blocks .* has 10 blocks of 32"):
        await admission.enter(demand("a", 100, 221))
    with pytest.raises(RequestError, match="in 2 sequences, need 12 blocks"):
        await admission.enter(demand("a", 100, 92, sequences=2))
    with pytest.raises(RequestError, match="1 prompts × 5 choices make 5 sequences; this server runs 4") as caught:
        await admission.enter(demand("a", 1, 1, sequences=5))
    assert caught.value.http_status == 400 and caught.value.param == "n"
    (await admission.enter(demand("a", 100, 220))).close()
    assert is_empty(admission)


@virtual
async def test_blocks_and_sequences_are_both_counted(clock):
    admission = Admission(Limits(blocks=10, max_concurrent=3), clock=clock)
    first = await admission.enter(demand("a", **blocks(8), output=0))
    full = asking(admission, **blocks(3))
    await settled()
    assert not full.done()
    first.close()
    await settled()
    two = asking(admission, **blocks(1), sequences=2)
    third = asking(admission, **blocks(1))
    await settled()
    assert full.done() and two.done() and not third.done()
    assert admission.snapshot().sequences == 3 and admission.snapshot().waiting == 1
    (await two).close()
    (await third).close()
    (await full).close()
    assert is_empty(admission)


@virtual
async def test_a_ticket_is_given_back_once(clock):
    admission = Admission(Limits(blocks=10), clock=clock)
    with pytest.raises(ValueError, match="boom"):
        async with await admission.enter(demand("a", 32, 0)) as ticket:
            raise ValueError("boom")
    ticket.close()
    ticket.close()
    ticket.produced(5)  # too late to count
    assert ticket.finish == "error" and ticket.tokens == 0 and is_empty(admission)


@virtual
async def test_cancelled_while_waiting(clock):
    admission = Admission(Limits(blocks=10), clock=clock)
    first = await admission.enter(demand("a", 320, 0))
    leaves, stays = asking(admission, **blocks(10)), asking(admission, **blocks(10))
    await settled()
    leaves.cancel()
    await settled()
    assert leaves.cancelled() and admission.snapshot().waiting == 1
    first.close()
    (await stays).close()
    assert is_empty(admission)


@virtual
async def test_cancelled_in_the_moment_of_admission(clock):
    """Its place was given to it, and it can no longer take it: the next must have it, or it is lost for ever."""
    admission = Admission(Limits(blocks=10), clock=clock)
    first = await admission.enter(demand("a", 320, 0))
    leaves, stays = asking(admission, **blocks(10)), asking(admission, **blocks(10))
    await settled()
    first.close()  # the turn of `leaves` is set, and its task has not run
    leaves.cancel()
    (await stays).close()
    assert leaves.cancelled() and is_empty(admission)


@virtual
async def test_cancelled_and_not_yet_cleaned_up_takes_no_place(clock):
    admission = Admission(Limits(blocks=10, max_queue=2), clock=clock)
    first = await admission.enter(demand("a", 320, 0))
    leaves, stays = asking(admission, **blocks(10)), asking(admission, **blocks(10))
    await settled()
    leaves.cancel()
    stays_too = asking(admission, key="b", **blocks(10))
    first.close()
    done, _ = await asyncio.wait([stays, stays_too], return_when=asyncio.FIRST_COMPLETED)
    (await done.pop()).close()
    for each in (await stays, await stays_too):
        each.close()
    assert is_empty(admission)


@virtual
async def test_refused_after_it_was_cancelled(clock):
    admission = Admission(Limits(blocks=10, max_queue=2), clock=clock)
    first = await admission.enter(demand("a", 320, 0))
    stays, leaves = asking(admission, **blocks(10)), asking(admission, **blocks(10))
    await settled()
    other = asking(admission, key="b", **blocks(10))  # makes the queue too long as soon as it runs,
    leaves.cancel()  # which is before the cancelled one does
    await settled()
    assert leaves.cancelled() and admission.snapshot().waiting_by_key == {"a": 1, "b": 1}
    first.close()
    for task in (stays, other):
        (await task).close()
    assert is_empty(admission)


@virtual
async def test_deadline_in_the_queue(clock):
    admission = Admission(Limits(blocks=10, first_token_deadline=60), clock=clock)
    with_it = await admission.enter(demand("a", 320, 0))
    with pytest.raises(Timeout) as caught:
        await admission.enter(demand("a", 320, 0))
    assert clock() == 60 and caught.value.http_status == 503 and caught.value.code == "timeout"
    with_it.close()
    assert is_empty(admission)


@virtual
async def test_who_gives_up_lets_those_behind_go(clock):
    """A request that holds everyone up leaves by its deadline: nothing else happens that would wake them."""
    admission = Admission(Limits(blocks=1000, max_concurrent=4, first_token_deadline=30, patience=0), clock=clock)
    runs = await admission.enter(demand("a", 32, 0))
    big = asking(admission, sequences=4)
    await settled()
    (await admission.enter(demand("a", 32, 0))).close()  # overtakes; from now on nobody does
    await asyncio.sleep(10)
    small = asking(admission)
    await asyncio.sleep(19)
    assert not small.done()
    with pytest.raises(Timeout):
        await big
    (await small).close()
    runs.close()
    assert is_empty(admission)


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


# ── Refusals ────────────────────────────────────────────────────────────────


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


# ── Order ───────────────────────────────────────────────────────────────────


@virtual
async def test_a_full_queue_takes_from_who_has_most(clock):
    admission = Admission(Limits(blocks=10, max_queue=4), clock=clock)
    runs = await admission.enter(demand("a", 320, 0))
    flood = [asking(admission, **blocks(10)) for _ in range(4)]
    await settled()
    other = asking(admission, key="b", **blocks(10))
    await settled()
    assert [task.done() for task in flood] == [False, False, False, True] and not other.done()
    with pytest.raises(Overloaded):
        await flood[3]
    with pytest.raises(Overloaded):
        await admission.enter(demand("a", 320, 0))
    runs.close()
    for task in (flood[0], other, *flood[1:3]):
        (await task).close()
    assert is_empty(admission)


@pytest.mark.parametrize("where", ["prompt", "output"])
def test_keys_share_by_tokens_not_by_requests(where):
    """a asks for 8 times as much in a request as b: b's requests go 8 times as often."""
    virtually(lambda clock: shared_by_tokens(clock, where))


async def shared_by_tokens(clock, where):
    admission = Admission(Limits(blocks=16, max_concurrent=1, max_queue=1000, first_token_deadline=1e6), clock=clock)
    tokens = defaultdict(int)

    async def one(key, count):
        prompt, output = (count, 0) if where == "prompt" else (1, count)
        async with await admission.enter(demand(key, prompt, output)) as ticket:
            await asyncio.sleep(count / 100)
            ticket.produced(output)
            tokens[key] += count

    tasks = [asyncio.create_task(one("a", 400)) for _ in range(100)]
    tasks += [asyncio.create_task(one("b", 50)) for _ in range(400)]
    await asyncio.sleep(200)
    assert tokens["a"] == pytest.approx(tokens["b"], abs=800) and sum(tokens.values()) > 19_000
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert is_empty(admission)


@virtual
async def test_nobody_saves_up_while_away(clock):
    """a worked alone for long; b, new, gets its share from now on and not what a had before."""
    admission = Admission(Limits(blocks=16, max_concurrent=1, max_queue=1000, first_token_deadline=1e6), clock=clock)
    order = []

    async def one(key):
        async with await admission.enter(demand(key, 100, 0)):
            order.append(key)
            await asyncio.sleep(1)

    await asyncio.gather(*(one("a") for _ in range(50)))
    tasks = [asyncio.create_task(one(key)) for key in ("a",) * 20 + ("b",) * 20]
    await asyncio.gather(*tasks)
    assert order[50:70].count("a") in (9, 10, 11)
    assert is_empty(admission)


@virtual
async def test_a_big_one_is_overtaken_for_a_while_only(clock):
    admission = Admission(Limits(blocks=100, patience=5), clock=clock)
    admitted = {}

    async def one(name, count, seconds):
        async with await admission.enter(demand("a", 32 * count, 0)):
            admitted[name] = clock()
            await asyncio.sleep(seconds)

    tasks = [asyncio.create_task(one(f"before {n}", 10, 1 + n)) for n in range(10)]
    await settled()
    tasks.append(asyncio.create_task(one("big", 90, 1)))
    for second in range(40):
        await asyncio.sleep(0.5)
        tasks.append(asyncio.create_task(one(f"small {second}", 10, 4)))
    await asyncio.gather(*tasks)
    smalls = [admitted[name] for name in admitted if name.startswith("small")]
    overtook = [when for when in smalls if when < admitted["big"]]
    assert overtook and max(overtook) - min(overtook) <= 5
    assert admitted["big"] <= max(overtook) + 4 + 1


@virtual
async def test_long_ones_leave_a_quarter_to_the_others(clock):
    admission = Admission(Limits(blocks=100, patience=5), clock=clock)
    long = [asking(admission, key="a", **blocks(20)) for _ in range(4)]
    await settled()
    assert all(task.done() for task in long)  # nobody else is there
    (await long.pop()).close()
    late = [asking(admission, key="a", **blocks(20)) for _ in range(1)]
    await settled()
    assert late[0].done()
    (await late[0]).close()
    short = [asking(admission, key="b", **blocks(10)) for _ in range(5)]
    waits = asking(admission, key="a", **blocks(30))
    await settled()
    assert [task.done() for task in short] == [True] * 4 + [False] and not waits.done()
    (await long.pop()).close()  # 40 + 40: the fifth short one fits, the long one would make 70 and does not
    await settled()
    assert short[4].done() and not waits.done()
    for task in (*short, *long):
        (await task).close()
    (await waits).close()
    assert is_empty(admission)


@virtual
async def test_a_long_one_that_waits_for_its_share_holds_up_long_ones_only(clock):
    admission = Admission(Limits(blocks=100, max_concurrent=9, patience=5), clock=clock)
    long = [await admission.enter(demand("d", 32 * 20, 0)) for _ in range(3)]
    short = [await admission.enter(demand("c", 32 * 11, 0)) for _ in range(2)]
    held = asking(admission, key="a", **blocks(20))  # 18 are left
    for _ in range(2):
        overtakes = asking(admission, key="b", **blocks(1))
        await asyncio.sleep(6)
        assert overtakes.done() and not held.done()
        short.append(await overtakes)
    short_and_wide = asking(admission, key="b", prompt=1, sequences=3)  # 2 are left
    behind = asking(admission, key="e", **blocks(13))  # fits in the pool and in the share
    await settled()
    assert not behind.done() and not short_and_wide.done()
    short_and_wide.cancel()
    long.pop().close()
    long += [await held, await behind]
    for ticket in (*long, *short):
        ticket.close()
    assert is_empty(admission)


# ── All rules together ──────────────────────────────────────────────────────


@dataclass
class Simulated:
    """An engine that reads 1 000 tokens/s and writes 20 a second for each sequence; holds admission to its word."""

    admission: Admission
    clock: object
    blocks: int = 0
    sequences: int = 0
    log: list = field(default_factory=list)  # (when, number of the request)
    ends: dict = field(default_factory=dict)

    async def request(self, number, demand, produced, leaves_after):
        task = asyncio.create_task(self._served(number, demand, produced))
        if leaves_after is not None:
            asyncio.get_running_loop().call_later(leaves_after, task.cancel)
        try:
            self.ends[number] = await task
        except asyncio.CancelledError:
            self.ends[number] = "left"
        except (Overloaded, RequestError, Timeout) as error:
            self.ends[number] = type(error).__name__

    async def _served(self, number, demand, produced):
        limits, needs = self.admission.limits, demand.blocks(32)
        async with await self.admission.enter(demand) as ticket:
            self.log.append((self.clock(), number))
            self.blocks, self.sequences = self.blocks + needs, self.sequences + demand.sequences
            assert self.blocks <= limits.blocks and self.sequences <= limits.max_concurrent
            now = self.admission.snapshot()
            assert now.blocks_used >= self.blocks and now.sequences >= self.sequences  # others may be about to begin
            try:
                async for _ in ticket.watch(self._events(demand, min(produced, max(demand.outputs)))):
                    pass
            finally:
                self.blocks, self.sequences = self.blocks - needs, self.sequences - demand.sequences
        return ticket.finish

    async def _events(self, demand, produced):
        await asyncio.sleep(demand.prompt / 1000)
        yield Event(1, (0,))
        for _ in range(0, produced, 20):
            await asyncio.sleep(1)
            yield Event(1, (0,) * 20 * demand.sequences)
        yield Event(1, finish_reason="stop")


requests = some.lists(
    some.tuples(
        some.floats(0, 3),  # seconds after the one before
        some.sampled_from("abc"),
        some.integers(1, 2500),
        some.integers(1, 800),
        some.integers(1, 4),
        some.integers(0, 800),  # produced
        some.none() | some.floats(0, 30),  # leaves after
    ),
    max_size=40,
)
pools = some.builds(
    Limits,
    blocks=some.integers(20, 150),
    max_concurrent=some.integers(1, 8),
    max_queue=some.integers(0, 20),
    first_token_deadline=some.floats(5, 120),
    total_deadline=some.none() | some.floats(5, 60),
    patience=some.floats(0, 5),
)


@settings(max_examples=100, deadline=None)
@given(requests, pools)
def test_every_request_ends_and_nothing_is_overrun(traffic, limits):
    async def main(clock):
        admission = Admission(limits, clock=clock)
        engine = Simulated(admission, clock)
        tasks, demands, came = [], [], []
        for number, (after, key, prompt, output, sequences, produced, leaves) in enumerate(traffic):
            await asyncio.sleep(after)
            demands.append(demand(key, prompt, output, sequences))
            came.append(clock())
            tasks.append(asyncio.create_task(engine.request(number, demands[-1], produced, leaves)))
        await asyncio.gather(*tasks)
        assert set(engine.ends) == set(range(len(traffic))) and is_empty(admission)
        assert set(engine.ends.values()) <= {"stop", "left", "Overloaded", "RequestError", "Timeout"}
        for number, end in engine.ends.items():
            never = demands[number].blocks(32) > limits.blocks or demands[number].sequences > limits.max_concurrent
            assert (end == "RequestError") == never
        for when, number in engine.log:
            assert when - came[number] <= limits.first_token_deadline + 1e-6
        nobody_was_starved(engine.log, demands, limits)

    virtually(main)


def nobody_was_starved(log, demands, limits):
    """Requests of one key that came later go before an earlier one for `patience` at most; a long one, which may wait
    for its share, is so passed by long ones only."""
    place = {number: (when, at) for at, (when, number) in enumerate(log)}
    for number, (_, at) in place.items():
        long = demands[number].blocks(32) > limits.blocks / 8
        passed_by = [
            when for when, other in log[:at]
            if other > number and demands[other].key == demands[number].key
            and (not long or demands[other].blocks(32) > limits.blocks / 8)
        ]  # fmt: skip
        assert not passed_by or max(passed_by) - min(passed_by) <= limits.patience + 1e-6


@settings(max_examples=20, deadline=None, derandomize=True)
@given(some.integers(1, 2000), some.integers(10, 300), some.integers(1, 2000), some.integers(10, 300), some.data())
def test_a_flood_leaves_the_other_its_share(prompt, output, other_prompt, other_output, data):
    """One key keeps the queue full; another, with a few requests at a time, still gets 40 % of what is computed, as
    long as it asks for that much."""
    limits = Limits(blocks=400, max_concurrent=8, max_queue=data.draw(some.integers(20, 60)), first_token_deadline=1e6)

    async def main(clock):
        admission = Admission(limits, clock=clock)
        done = defaultdict(float)

        async def client(key, prompt, output):
            while True:
                try:
                    async with await admission.enter(demand(key, prompt, output)) as ticket:
                        await asyncio.sleep(prompt / 1000)
                        ticket.produced(1)
                        done[key] += prompt
                        for _ in range(0, output, 20):
                            await asyncio.sleep(1)
                            ticket.produced(20)
                            done[key] += 40
                except Overloaded as error:
                    await asyncio.sleep(min(error.retry_after, 5))

        clients = [asyncio.create_task(client("flood", prompt, output)) for _ in range(60)]
        await asyncio.sleep(20)
        done.clear()
        clients += [asyncio.create_task(client("other", other_prompt, other_output)) for _ in range(10)]
        await asyncio.sleep(300)
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        assert is_empty(admission)
        assert done["other"] >= 0.4 * sum(done.values())

    virtually(main)
