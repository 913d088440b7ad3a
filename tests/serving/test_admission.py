"""Who is let in, and when, one rule at a time."""

import asyncio
from collections import defaultdict

import pytest

from lightship.errors import EngineDied, Overloaded, RequestError, Timeout, UsageError
from lightship.serving.admission import Admission
from lightship.serving.ticket import Demand, Limits
from tests.serving.virtual import asking, blocks, demand, is_empty, settled, virtual, virtually


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
async def test_nobody_is_let_in_before_the_engine_is_known(clock):
    """Who asks for more than it turns out to have hears so then; the others go by what it has."""
    seen = []
    admission = Admission(Limits(blocks=10**9), clock=clock, begun=False)
    admission._reject = seen.append
    large, first, second = (asking(admission, prompt=each) for each in (700, 128, 320))
    await settled()
    assert admission.snapshot().waiting == 3 and admission.snapshot().running == 0
    admission.begin(Limits(blocks=40, block_tokens=16))
    await settled()
    with pytest.raises(RequestError, match=r"700 prompt tokens .* 40 blocks of 16"):
        await large
    assert seen == ["too_large"]
    ends = await first, await second
    assert [ticket.blocks for ticket in ends] == [8, 20]
    third = asking(admission, prompt=320)
    await settled()
    assert not third.done()
    for ticket in ends:
        ticket.close()
    (await third).close()
    assert is_empty(admission)


@virtual
async def test_who_waits_for_an_engine_that_never_comes_hears_so(clock):
    admission = Admission(Limits(blocks=10**9), clock=clock, begun=False)
    both = [asking(admission, key=key, tokens_per_minute=100, prompt=60) for key in "ab"]
    await settled()
    admission.end(EngineDied("it cannot be loaded"))
    for each in both:
        with pytest.raises(EngineDied, match="cannot be loaded"):
            await each
    assert clock() == 0 and is_empty(admission)
    again = asking(admission, key="a", tokens_per_minute=100, prompt=60)  # it cost nothing
    admission.begin(Limits(blocks=10))
    (await again).close()


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


class TwoEngines:
    """The seats of two engines of two sequences each, of which one has stopped taking requests."""

    working, free = 2, 4

    def has_room(self, blocks, sequences, limits):
        return self.free >= sequences

    def seat(self, ticket, limits):
        self.free -= 1
        return self

    def leave(self):
        self.free += 1


@virtual
async def test_an_engine_that_drains_holds_nobody_up_before_an_idle_one(clock):
    seats = TwoEngines()
    admission = Admission(Limits(blocks=100, max_concurrent=2), clock=clock, seats=seats)
    first = [await admission.enter(demand("a", 1, 1)) for _ in range(2)]
    seats.working = 1  # theirs drains, the other is idle
    other = asking(admission)
    await settled()
    assert other.done()
    for ticket in (*first, await other):
        ticket.close()
    assert is_empty(admission) and seats.free == 4


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
