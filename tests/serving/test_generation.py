"""One request of many choices, engines that die under it, and clients that wait or leave: with an engine of a few lines
in this process."""

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from unittest.mock import ANY

import httpx
import pytest
import uvicorn

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import EngineDied, EngineError, Timeout
from lightship.serving import openai
from lightship.serving.admission import Admission
from lightship.serving.app import create_app
from lightship.serving.connection import COMMENT, Stream, begun
from lightship.serving.generation import Generation, choice_seed
from lightship.serving.model import ServedModel
from lightship.serving.server import bind, url_of, wait_ready
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Limits
from tests.serving.test_protocol import byte_tokenizer
from tests.serving.virtual import demand, virtually


@dataclass
class Script:
    """Says `together` bytes a turn for each request; dies on the `deaths`-th requests after `after` tokens."""

    together: int = 1
    deaths: tuple[int, ...] = ()
    after: int = 0
    recovers: bool = True
    asked: list[GenerationParams] = field(default_factory=list)
    running: int = 0
    waited: int = 0

    async def generate(self, tokens, params):
        self.asked.append(params)
        number = len(self.asked)
        self.running += 1
        try:
            for place in range(0, params.max_tokens, self.together):
                await asyncio.sleep(0)
                if number in self.deaths and place == self.after:
                    raise EngineDied("dead")
                end = min(place + self.together, params.max_tokens)
                said = tuple((tokens[-1] + 1 + each) % 256 for each in range(place, end))
                yield Event(
                    1,
                    said,
                    tuple(-1.0 - each for each in range(place, end)),
                    "length" if end == params.max_tokens else None,
                )
        finally:
            self.running -= 1

    async def recovered(self, timeout):
        self.waited += 1
        if not self.recovers:
            raise EngineDied("still dead")


@pytest.fixture(scope="module")
def model():
    return ServedModel("fake", "0" * 64, 2048, 256, byte_tokenizer(), None)


def generation(engine, model, prompts=((97,),), n=1, seed=None, tokens=3):
    params = [GenerationParams(max_tokens=tokens, seed=seed) for _ in prompts]
    return Generation(engine, model, prompts, params, n)


async def collect(asked):
    return [piece async for piece in asked.pieces()]


def test_choices_lie_prompt_by_prompt_and_the_first_keeps_the_seed(model):
    engine = Script()
    asked = generation(engine, model, prompts=([97], [109]), n=2, seed=5)
    pieces = asyncio.run(asked.whole())
    assert [(piece.index, piece.text, piece.finish) for piece in pieces] == [
        (0, "bcd", "length"), (1, "bcd", "length"), (2, "nop", "length"), (3, "nop", "length"),
    ]  # fmt: skip
    assert [params.seed for params in engine.asked] == [5, choice_seed(5, 1)] * 2
    assert asked.usage() == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}


@pytest.mark.parametrize("together", [1, 2, 3, 9])
@pytest.mark.parametrize(
    ("stop", "text", "counted", "finish"), [("de", "bc", 4, "stop"), ("zz", "bcdefghi", 8, "length")]
)
def test_what_is_computed_after_the_end_is_not_counted(model, together, stop, text, counted, finish):
    """However many tokens came together, as they do from an engine that is faster than its reader, or that drafts."""
    asked = generation(Script(together=together), model, tokens=8)
    asked.stops, asked.params = [stop], [replace(asked.params[0], logprobs=True)]
    (piece,) = asyncio.run(asked.whole())
    assert (piece.text, piece.finish, piece.produced) == (text, finish, counted)
    assert asked.usage()["completion_tokens"] == counted
    assert [token.logprob for token in piece.tokens] == [-1.0 - each for each in range(len(text))]


def test_seeds_of_choices_differ_and_stay():
    seeds = [choice_seed(5, choice) for choice in range(8)]
    assert seeds[0] == 5 and len(set(seeds)) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[1] == 1_480_426_878  # a change here changes what users get for their seeds
    assert choice_seed(None, 3) is None


def test_pieces_of_choices_come_side_by_side(model):
    pieces = asyncio.run(collect(generation(Script(), model, n=3)))
    assert {piece.index for piece in pieces[:3]} == {0, 1, 2}


@pytest.mark.parametrize("whole", [True, False])
def test_an_engine_is_waited_for_no_longer_than_the_request_may_take(model, whole):
    class Away(Script):
        async def recovered(self, timeout):
            await asyncio.sleep(timeout)

    async def main(clock):
        asked = generation(Away(deaths=(1,)), model)
        admission = Admission(Limits(blocks=10, first_token_deadline=10), clock=clock)
        async with await admission.enter(demand("a", 1, 3)) as asked.ticket:
            with pytest.raises(Timeout, match="first token"):
                await (asked.whole() if whole else collect(asked))
        return clock()

    assert virtually(main) == 10


@pytest.mark.parametrize("n", [1, 2])
def test_an_engine_that_dies_before_anything_was_sent_is_asked_again(model, n):
    engine = Script(deaths=(1,))
    pieces = asyncio.run(collect(generation(engine, model, n=n)))
    assert "".join(piece.text for piece in pieces if piece.index == 0) == "bcd"
    assert engine.waited == 1 and engine.running == 0


def test_a_whole_answer_is_asked_for_again_whenever_the_engine_dies(model):
    engine = Script(deaths=(1,), after=2)
    asked = generation(engine, model)
    assert [piece.text for piece in asyncio.run(asked.whole())] == ["bcd"]
    assert asked.usage()["completion_tokens"] == 3  # of the answer that was given


def test_a_stream_that_has_begun_ends_with_the_error(model):
    engine = Script(deaths=(1,), after=1)
    with pytest.raises(EngineDied):
        asyncio.run(collect(generation(engine, model)))
    assert engine.waited == 0


@pytest.mark.parametrize("engine", [Script(deaths=(1, 2)), Script(deaths=(1,), recovers=False)])
def test_it_is_asked_again_once_and_only_when_it_recovers(model, engine):
    with pytest.raises(EngineDied):
        asyncio.run(generation(engine, model).whole())
    assert engine.waited == 1


def test_the_error_of_one_choice_ends_the_others(model):
    engine = Script(deaths=(2,), after=1)

    async def run():
        async with asyncio.timeout(5):
            with pytest.raises(EngineError):
                await collect(generation(engine, model, n=3, tokens=10**9))
        return engine.running

    assert asyncio.run(run()) == 0


def test_leaving_cancels_every_choice(model):
    engine = Script()

    async def run():
        pieces = generation(engine, model, n=4, tokens=10**9).pieces()
        await anext(pieces)
        assert engine.running == 4
        async with asyncio.timeout(5):
            await pieces.aclose()
        return engine.running

    assert asyncio.run(run()) == 0


async def slow(ended, before=0.08):
    try:
        await asyncio.sleep(before)
        yield "1"
        await asyncio.sleep(0.2)
        yield "2"
    finally:
        ended.append(True)


def test_an_answer_that_begins_late_loses_nothing():
    ended = []

    async def run():
        assert await begun(slow([], before=0), 5) == ("1", ANY)
        first, source = await begun(slow(ended), 0.01)
        return first, [each async for each in source]

    assert asyncio.run(run()) == (None, ["1", "2"]) and ended == [True]


@pytest.mark.parametrize("when", ["before it begins", "in the middle"])
def test_leaving_ends_the_source(when):
    ended = []

    async def run():
        waiting = asyncio.create_task(begun(slow(ended, before=60), 0.01 if when == "in the middle" else 60))
        await asyncio.sleep(0.05)
        if when == "in the middle":
            _, source = await waiting
            waiting = asyncio.create_task(anext(source))
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return list(ended)

    assert asyncio.run(run()) == [True]


def test_a_comment_breaks_the_silence_and_none_comes_after_the_end():
    sent, ended = [], []

    async def send(message):
        sent.append(message.get("body", b"start"))

    async def run():
        stream = Stream(slow([]), lambda: ended.append(True), 0.03)
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, asyncio.Event().wait, send)
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert [each for each in sent if each != COMMENT] == [b"start", b"1", b"2", b""] and ended == [True]
    assert 1 <= sent[: sent.index(b"1")].count(COMMENT) <= 3 and sent[-1] == b""
    assert 2 <= sent[sent.index(b"1") :].count(COMMENT) <= 8


def test_over_http_a_lost_engine_costs_time_and_no_answer(tmp_path):
    """The engine is killed under an answer that was not begun to be sent: the client sees it whole."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 256, "max_position_embeddings": 2048}))
    (tmp_path / "fake.json").write_text(json.dumps({"slow": 0.02}))
    supervisor = Supervisor("fake", EngineSettings())
    supervisor.load(tmp_path)
    model = ServedModel.load("fake", "0" * 64, tmp_path)
    app = create_app(supervisor, lambda app: openai.add_routes(app, supervisor, model, keep_alive=0.1))
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        url = url_of(bound)
        wait_ready(url, 30, thread.is_alive)
        pids = [supervisor.pid]
        killer = threading.Thread(target=lambda: (time.sleep(0.3), os.kill(pids[0], signal.SIGKILL)))
        killer.start()
        body = {"prompt": "a", "max_tokens": 40, "n": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        killer.join()
        assert answer.status_code == 200, answer.text
        assert [len(choice["text"]) for choice in answer.json()["choices"]] == [40, 40]
        assert answer.json()["usage"]["completion_tokens"] == 80 and supervisor.pid != pids[0]
        server.should_exit = True
        thread.join(10)
