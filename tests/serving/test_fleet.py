"""Several engines as one: over real child processes with `FakeEngine`, and the choice of an engine by itself."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal

import httpx
import psutil
import pytest

from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import EngineDied
from lightship.serving.admission import Admission
from lightship.serving.fleet import SLACK, Fleet, open_engine
from lightship.serving.front import learn
from lightship.serving.placement import Place
from lightship.serving.prefix import BLOCK, Prefix
from lightship.serving.server import running
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Care, Supervisor, once_more
from lightship.serving.ticket import Demand, Limits
from tests.serving.supervised import faults, until
from tests.serving.test_api import worker_pids

QUICK = Care(backoff=0.05, interval=0.05)
POOL = Limits(blocks=10, max_concurrent=4)


@contextlib.asynccontextmanager
async def fleet_of(folder, count=2, settings=EngineSettings(), care=QUICK):  # noqa: B008 (it is frozen)
    fleet = Fleet("fake", settings, care, [Place()] * count)
    fleet.load(folder)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()
        assert not fleet.alive


def demand(prompt=32, output=0, tokens=None):
    return Demand("", (prompt,), (output,), prefix=None if tokens is None else Prefix(tokens))


def at(fleet, ticket):
    """The number of the engine that a ticket has its seat at."""
    return fleet.engines.index(ticket.seat.member.engine)


async def answer(ticket, prompt=1, count=20):
    """As `Generation` asks: once more when the engine dies."""

    async def attempt():
        return [token async for event in ticket.seat.generate([prompt], GenerationParams(max_tokens=count))
                for token in event.token_ids]  # fmt: skip

    return await once_more(attempt, lambda: False, ticket.seat, 20)


# ── Where a request goes ────────────────────────────────────────────────────


def test_each_goes_to_the_engine_with_the_least_left_to_do(tmp_path):
    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(Limits(blocks=1000), seats=fleet)
            scored = await admission.enter(Demand("", (9000,) * 9, (0,) * 9, beside=True))
            assert at(fleet, scored) == 0 and scored.seat.left() == 0  # the engine has nothing to do with it
            long = await admission.enter(demand(3000, 100))
            assert at(fleet, long) == 0
            short = [await admission.enter(demand(100, 100)) for _ in range(3)]
            assert {at(fleet, ticket) for ticket in short} == {1 - at(fleet, long)}
            long.produced(90)  # its prompt is read, and ten tokens are left
            assert at(fleet, await admission.enter(demand(100))) == at(fleet, long)

    asyncio.run(run())


def test_who_begins_alike_goes_where_that_was_read_unless_much_more_is_to_do_there(tmp_path):
    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(Limits(blocks=10_000), seats=fleet)
            story, other = list(range(4 * BLOCK)), list(range(9, 9 + 4 * BLOCK))
            first = await admission.enter(demand(256, 100, story))
            second = await admission.enter(demand(256, 100, other))
            assert at(fleet, first) != at(fleet, second)
            longer = await admission.enter(demand(300, 100, [*story, *range(44)]))
            assert at(fleet, longer) == at(fleet, first)  # though the other has less to do
            half = await admission.enter(demand(256, 50, [*story[: 2 * BLOCK], *other[: 2 * BLOCK]]))
            assert at(fleet, half) == at(fleet, first)
            longer.close(), half.close()
            busy = await admission.enter(demand(2 * (356 + SLACK), 0, story))
            assert at(fleet, busy) == at(fleet, first)
            assert at(fleet, await admission.enter(demand(256, 100, story))) == at(fleet, second)

    asyncio.run(run())


def test_without_a_prefix_cache_nobody_looks_at_how_prompts_begin(tmp_path):
    """It would also tell one key by the time of its answer what another asked."""

    async def run():
        async with fleet_of(tmp_path, settings=EngineSettings(prefix_cache=False)) as fleet:
            admission = Admission(Limits(blocks=10_000), seats=fleet)
            story = list(range(4 * BLOCK))
            first = await admission.enter(demand(256, 100, story))
            assert at(fleet, await admission.enter(demand(256, 100, story))) != at(fleet, first)
            assert "marks" not in vars(first.demand.prefix)

    asyncio.run(run())


def test_what_an_engine_has_read_is_forgotten_in_time_and_with_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("lightship.serving.fleet.REMEMBERED", 6)

    async def run():
        async with fleet_of(tmp_path) as fleet:
            (member, _), stories = fleet._members, [Prefix(range(n, n + 4 * BLOCK)).marks for n in range(3)]
            member.learn(stories[0])
            assert member.knows(stories[0]) == 4 and member.knows(stories[1]) == 0
            member.learn(stories[1])
            assert member.knows(stories[1]) == 4 and member.knows(stories[0]) == 2  # its last blocks went first
            os.kill(member.engine.pid, signal.SIGKILL)
            await until(lambda: member.engine.restarts == 1 and member.engine.ready)
            assert member.knows(stories[1]) == 0

    asyncio.run(run())


def test_prefixes_agree_as_far_as_whole_blocks_do():
    story = list(range(3 * BLOCK + 5))
    whole, changed = Prefix(story).marks, Prefix([*story[: 2 * BLOCK], 7, *story[2 * BLOCK + 1 :]]).marks
    assert len(whole) == 3 and whole[:2] == changed[:2] and whole[2] != changed[2]
    assert Prefix(story[:BLOCK] * 2).marks[0] != Prefix(story[:BLOCK] * 2).marks[1]
    assert Prefix(story[: BLOCK - 1]).marks == ()


# ── What fits ───────────────────────────────────────────────────────────────


def test_a_request_must_fit_into_one_pool_not_into_what_is_free_in_all(tmp_path):
    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(POOL, seats=fleet)
            held = [await admission.enter(demand(6 * 32)) for _ in range(2)]
            assert {at(fleet, ticket) for ticket in held} == {0, 1}
            waiting = asyncio.create_task(admission.enter(demand(5 * 32)))  # 8 are free, 4 in each
            assert not (await asyncio.wait({waiting}, timeout=0.1))[0]
            small = await admission.enter(demand(4 * 32))
            assert admission.snapshot().blocks == 20 and admission.snapshot().blocks_used == 16
            held[1 - at(fleet, small)].close()
            assert at(fleet, await waiting) == 1 - at(fleet, small)

    asyncio.run(run())


def test_sequences_are_counted_for_each_engine(tmp_path):
    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(Limits(blocks=1000, max_concurrent=3), seats=fleet)
            twos = [await admission.enter(Demand("", (32,), (0,), 2)) for _ in range(2)]
            waiting = asyncio.create_task(admission.enter(Demand("", (32,), (0,), 2)))
            ones = [await admission.enter(demand()) for _ in range(2)]
            assert not waiting.done() and {at(fleet, ticket) for ticket in ones} == {0, 1}
            twos[0].close()
            await waiting

    asyncio.run(run())


# ── When one dies ───────────────────────────────────────────────────────────


def test_one_that_dies_halves_the_capacity_and_its_requests_go_on_elsewhere_at_once(tmp_path):
    faults(tmp_path, slow=0.02)

    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(POOL, seats=fleet)
            tickets = [await admission.enter(demand(3 * 32)) for _ in range(2)]
            asked = [asyncio.create_task(answer(ticket, 7 + number)) for number, ticket in enumerate(tickets)]
            await until(lambda: all(engine._worker.produced > 3 for engine in fleet.engines))
            faults(tmp_path, load=3)  # the next one is not there while this is looked at
            os.kill(fleet.engines[at(fleet, tickets[0])].pid, signal.SIGKILL)
            assert await asyncio.gather(*asked) == [list(range(8, 28)), list(range(9, 29))]
            assert at(fleet, tickets[0]) == at(fleet, tickets[1])
            assert fleet.ready and fleet.live and fleet.working == 1
            assert admission.snapshot().blocks == 10 and admission.snapshot().blocks_used == 6
            third = await admission.enter(demand(3 * 32))
            assert at(fleet, third) == at(fleet, tickets[1])
            waiting = asyncio.create_task(admission.enter(demand(3 * 32)))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await waiting  # once the next engine is there
            assert fleet.working == 2 and fleet.restarts == 1 and admission.snapshot().blocks == 20

    asyncio.run(run())


def test_a_stream_that_had_begun_ends_with_the_error_and_those_of_the_others_go_on(tmp_path):
    faults(tmp_path, slow=0.01)

    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(POOL, seats=fleet)
            tickets = [await admission.enter(demand(32)) for _ in range(2)]
            streams = [ticket.seat.generate([1], GenerationParams(max_tokens=60)) for ticket in tickets]
            for stream in streams:
                await anext(stream)
            os.kill(fleet.engines[at(fleet, tickets[0])].pid, signal.SIGKILL)
            with pytest.raises(EngineDied):
                [event async for event in streams[0]]
            assert len([token async for event in streams[1] for token in event.token_ids]) == 59

    asyncio.run(run())


def test_who_lost_its_engine_waits_for_room_and_goes_before_who_is_new(tmp_path):
    faults(tmp_path, slow=0.01)

    async def run():
        async with fleet_of(tmp_path) as fleet:
            admission = Admission(POOL, seats=fleet)
            lost, held = [await admission.enter(demand(8 * 32)) for _ in range(2)]
            asked = asyncio.create_task(answer(lost))
            await until(lambda: fleet.engines[at(fleet, lost)]._worker.produced > 3)
            faults(tmp_path, load=60)
            os.kill(fleet.engines[at(fleet, lost)].pid, signal.SIGKILL)
            await until(lambda: len(fleet._moving) == 1)
            new = asyncio.create_task(admission.enter(demand(32)))  # there is room for it
            await asyncio.sleep(0.1)
            assert not new.done() and not asked.done()
            held.close()
            assert await asked == list(range(2, 22)) and at(fleet, lost) == at(fleet, held)
            assert at(fleet, await new) == at(fleet, held)

    asyncio.run(run())


def test_who_lost_its_engine_keeps_room_free_at_one_other_only(tmp_path):
    faults(tmp_path, slow=0.01)

    async def run():
        async with fleet_of(tmp_path, count=3) as fleet:
            admission = Admission(POOL, seats=fleet)
            lost, held, other = [await admission.enter(demand(6 * 32)) for _ in range(3)]
            more = await admission.enter(demand(32))  # 3 blocks are left at one of them, 4 at the other
            while at(fleet, more) == at(fleet, lost):
                more = await admission.enter(demand(32))
            asked = asyncio.create_task(answer(lost))
            await until(lambda: fleet.engines[at(fleet, lost)]._worker.produced > 3)
            faults(tmp_path, load=60)
            os.kill(fleet.engines[at(fleet, lost)].pid, signal.SIGKILL)
            await until(lambda: len(fleet._moving) == 1)
            full, free = (held, other) if at(fleet, more) == at(fleet, held) else (other, held)
            new = await asyncio.wait_for(admission.enter(demand(3 * 32)), 5)
            assert at(fleet, new) == at(fleet, full)  # the other, where more is free, is kept for the one that moves
            waiting = asyncio.create_task(admission.enter(demand(32)))
            await asyncio.sleep(0.1)
            assert not waiting.done() and not asked.done()
            free.close()
            assert await asked == list(range(2, 22)) and at(fleet, lost) == at(fleet, free)
            assert at(fleet, await waiting) == at(fleet, free)

    asyncio.run(run())


def test_when_all_are_down_it_says_so(tmp_path):
    async def run():
        async with fleet_of(tmp_path, care=Care(restarts=0, interval=0.05)) as fleet:
            ticket = await Admission(POOL, seats=fleet).enter(demand())
            os.kill(fleet.engines[0].pid, signal.SIGKILL)
            await until(lambda: fleet.engines[0].down)
            assert fleet.live and fleet.ready
            waiting = asyncio.create_task(ticket.seat.recovered(30))
            await waiting  # at the other
            os.kill(fleet.engines[1].pid, signal.SIGKILL)
            await until(lambda: fleet.engines[1].down)
            assert not fleet.live and not fleet.ready and "stays down" in fleet.failure
            with pytest.raises(EngineDied, match="stays down"):
                await ticket.seat.recovered(30)
            with pytest.raises(EngineDied):
                [event async for event in fleet.generate([1], GenerationParams())]

    asyncio.run(run())


def test_one_that_cannot_be_loaded_is_an_error_of_all(tmp_path):
    faults(tmp_path, unheard_of=1)

    async def run():
        with pytest.raises(Exception, match=r"cannot be loaded.*unheard_of"):
            async with fleet_of(tmp_path):
                raise AssertionError("it started")

    asyncio.run(run())


def test_it_is_ready_when_all_are_loaded_and_not_before(tmp_path):
    """Else requests were let in before it is known what the caches hold."""
    late = tmp_path / "late"
    late.mkdir()
    faults(late, load=1.5)

    async def run():
        fleet = Fleet("fake", EngineSettings(), QUICK, [Place()] * 2)
        for engine, folder in zip(fleet.engines, (tmp_path, late), strict=True):
            engine.load(folder)
        starting = asyncio.create_task(fleet.start())
        try:
            await until(lambda: any(engine.ready for engine in fleet.engines))
            assert not all(engine.ready for engine in fleet.engines) and not fleet.ready
            admission = Admission(Limits(blocks=10**9), seats=fleet, begun=False)
            early = asyncio.create_task(admission.enter(demand(64)))
            await starting
            assert fleet.ready and not early.done()
            learn(admission, {"blocks": 10, "block_tokens": 16})
            assert (await early).blocks == 4 and admission.snapshot().blocks == 20
        finally:
            await fleet.close()

    asyncio.run(run())


# ── Where engines run ───────────────────────────────────────────────────────


def test_an_engine_is_held_to_its_cores_with_as_many_threads(tmp_path):
    core = max(os.sched_getaffinity(0))

    async def run():
        fleet = Fleet("fake", EngineSettings(), QUICK, [Place(), Place(frozenset({core}), 1)])
        fleet.load(tmp_path)
        try:
            await fleet.start()
            assert psutil.Process(fleet.engines[1].pid).cpu_affinity() == [core]
            assert set(psutil.Process(fleet.engines[0].pid).cpu_affinity()) == os.sched_getaffinity(0)
            assert fleet.engines[1]._settings.threads == 1 and fleet.engines[0]._settings.threads is None
        finally:
            await fleet.close()

    asyncio.run(run())


def test_one_engine_is_no_fleet_and_what_was_asked_goes_before_the_place():
    engine = open_engine("fake", EngineSettings(threads=3), QUICK, [Place(None, 1)])
    assert isinstance(engine, Supervisor) and engine._settings.threads == 3


# ── The whole server ────────────────────────────────────────────────────────


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="an engine has at least one core")
def test_a_server_of_two_loses_one_under_load_and_no_answer(bundle_path):
    before = set(worker_pids())
    with running(bundle_path, settings=ServeSettings(keys=None, workers=2)) as url:
        pids = sorted(set(worker_pids()) - before)
        assert len(pids) == 2
        bodies = [{"prompt": f"Once {number}", "max_tokens": 60, "temperature": 0} for number in range(12)]

        def ask(body):
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        alone = [ask(body).json()["choices"][0]["text"] for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, body) for body in bodies * 6]
            concurrent.futures.wait(asked[:20])
            os.kill(pids[0], signal.SIGKILL)
            answers = [each.result() for each in asked]
        assert {each.status_code for each in answers} == {200}
        assert httpx.get(f"{url}/readyz").status_code == httpx.get(f"{url}/livez").status_code == 200
        assert [each.json()["choices"][0]["text"] for each in answers[-12:]] == alone
        text = httpx.get(f"{url}/metrics").text
        assert 'lightship:engines{model_name="tiny"} 2.0' in text
