"""All rules of admission together, on simulated traffic."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as some

from lightship.engine import Event
from lightship.errors import Overloaded, RequestError, Timeout
from lightship.serving.admission import Admission
from lightship.serving.ticket import Limits
from tests.serving.virtual import demand, is_empty, virtual, virtually


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


@virtual
async def test_ten_times_more_than_it_can_do(clock):
    """The engine stays full, who is let in waits no longer than predicted, the others are told at once."""
    limits = Limits(blocks=400, max_concurrent=8, max_queue=256, first_token_deadline=60)
    admission = Admission(limits, clock=clock)
    engine, took, full = Simulated(admission, clock), {}, []

    async def one(number):
        came = clock()
        await engine.request(number, demand("a", 200, 400), 400, None)
        took[number] = clock() - came

    tasks = []
    for number in range(1200):  # each takes 20.2 s, 8 at a time: 0.4 a second
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.sleep(0.25)
        full.append(admission.snapshot().sequences)
    await asyncio.gather(*tasks)
    later = range(400, 1200)  # before the first has ended nobody is turned away, and the last of those wait in vain
    assert {engine.ends[number] for number in later} == {"stop", "Overloaded"} and min(full[100:]) == 8
    turned_away = [number for number in later if engine.ends[number] == "Overloaded"]
    assert 600 < len(turned_away) < 780 and max(took[number] for number in turned_away) == 0
    waited = [when - number / 4 for when, number in engine.log if number >= 400]
    assert 5 < max(waited) < 40
