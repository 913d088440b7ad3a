"""How a server ends: with `FakeEngine` in a real child and real HTTP in front."""

import contextlib
import json
import signal
import time

import httpx
import pytest
import uvicorn

from lightship.engine import EngineSettings
from lightship.serving import openai
from lightship.serving.app import create_app
from lightship.serving.draining import Door, DrainingServer, Turnstile
from lightship.serving.model import ServedModel
from lightship.serving.server import bind, in_thread, url_of
from lightship.serving.supervisor import Supervisor
from tests.serving.test_protocol import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "fake.json").write_text(json.dumps({"slow": 0.001}))  # seconds a token
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256, "max_position_embeddings": 10_000_000}))
    return folder


@contextlib.contextmanager
def served(folder, drain):
    worker = Supervisor("fake", EngineSettings())
    worker.load(folder)
    model = ServedModel.load("fake", "0" * 64, folder)
    door = Door()
    app = create_app(worker, lambda app: openai.add_routes(app, worker, model), stopping=lambda: door.closing)
    app.add_middleware(Turnstile, door=door)
    with bind("127.0.0.1", 0) as bound:
        server = DrainingServer(uvicorn.Config(app, log_level="critical"), door, worker.close, drain)
        with in_thread(server, bound, url_of(bound)) as thread:
            yield url_of(bound), server, thread
    assert not thread.is_alive() and not worker.alive


def stream(url, tokens):
    body = {"prompt": "a", "max_tokens": tokens, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20)


def first_of(lines):
    return next(line for line in lines if line.startswith("data: "))


def test_readiness_goes_first_and_what_runs_may_finish(folder):
    with served(folder, 30) as (url, server, thread), stream(url, 3000) as answer:
        lines = answer.iter_lines()
        first_of(lines)
        server.handle_exit(signal.SIGTERM, None)
        ready, late = httpx.get(f"{url}/readyz"), httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert ready.status_code == 503 and ready.json()["status"] == "stopping"
        assert httpx.get(f"{url}/livez").status_code == 200
        assert (httpx.get(f"{url}/health").status_code, ready.json()) == (503, httpx.get(f"{url}/health").json())
        assert late.status_code == 503 and late.json()["error"]["code"] == "stopping" and late.headers["retry-after"]
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("drain", [1, 600], ids=["late", "second signal"])
def test_what_runs_too_long_is_told_so(folder, drain):
    with served(folder, drain) as (url, server, thread), stream(url, 900_000) as answer:
        lines = answer.iter_lines()
        first_of(lines)
        began = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        if drain == 600:
            server.handle_exit(signal.SIGTERM, None)
        *_, last, done = [line for line in lines if line]
        assert json.loads(last[6:])["error"]["code"] == "unavailable" and done == "data: [DONE]"
        thread.join(5)
        assert not thread.is_alive() and time.monotonic() - began < 10


def test_with_nothing_running_it_ends_at_once(folder):
    with served(folder, 600) as (_, server, thread):
        server.handle_exit(signal.SIGINT, None)
        thread.join(5)
        assert not thread.is_alive()
