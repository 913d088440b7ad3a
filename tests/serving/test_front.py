"""The whole server as `serve` puts it together, with the tiny real model: doors, admission, metrics, log, recovery."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from lightship.cli.serve import REPRODUCIBLE
from lightship.engine import EngineSettings
from lightship.errors import UsageError
from lightship.report import Report
from lightship.serving.keys import KeyFile
from lightship.serving.server import Serving, in_thread, running, wait_ready
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Care, Supervisor
from tests.serving.door import model_folder
from tests.serving.test_api import worker_pids

LONG = {"prompt": "Once", "max_tokens": 1900, "temperature": 1, "seed": 1}


def post(url, body, key=None, route="/v1/completions", timeout=60):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(url + route, json=body, headers=headers, timeout=timeout)


@pytest.fixture(scope="module")
def keyed(bundle_path, tmp_path_factory):
    """A server with keys, and a log of its requests."""
    folder = tmp_path_factory.mktemp("keys")
    file = KeyFile(folder / "keys.json")
    keys = {name: file.create(name, **options)[1] for name, options in {
        "plain": {}, "watcher": {"scopes": ("metrics",)}, "slow": {"requests_per_minute": 1},
    }.items()}  # fmt: skip
    settings = ServeSettings(keys=file.path, log=folder / "log")
    with running(bundle_path, settings=settings) as url:
        yield url, keys, folder / "log"


def test_nothing_is_answered_without_a_key_but_health(keyed):
    url, keys, _ = keyed
    for route in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert httpx.get(url + route).status_code == 401
    for route in ("/livez", "/readyz", "/health"):
        assert httpx.get(url + route).status_code == httpx.head(url + route).status_code == 200
    assert post(url, {"prompt": "a", "max_tokens": 2}).json()["error"]["code"] == "invalid_api_key"
    assert post(url, {"prompt": "a", "max_tokens": 2}, keys["plain"]).status_code == 200
    assert post(url, {"prompt": "a", "max_tokens": 2}, keys["watcher"]).status_code == 403


def test_a_key_has_its_own_rate(keyed):
    url, keys, _ = keyed
    body = {"prompt": "a", "max_tokens": 2}
    assert post(url, body, keys["slow"]).status_code == 200
    refused = post(url, body, keys["slow"])
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert post(url, body, keys["plain"]).status_code == 200


def test_metrics_and_log_know_of_a_request_and_nothing_of_its_text(keyed):
    url, keys, log = keyed
    before = scraped(url, keys["watcher"])
    answer = post(url, {"prompt": "a very private text", "max_tokens": 7}, keys["plain"])
    after = scraped(url, keys["watcher"])
    usage = answer.json()["usage"]
    gained = {name: after[name] - before[name] for name in after if name in before}
    assert gained["lightship:prompt_tokens_total"] == usage["prompt_tokens"]
    assert gained["lightship:generation_tokens_total"] == usage["completion_tokens"]
    assert after["lightship:num_requests_running"] == after["lightship:num_requests_waiting"] == 0
    assert after["lightship:engine_memory_bytes"] > 1e6 and after["lightship:kv_blocks"] > 100
    deadline = time.monotonic() + 5
    while answer.headers["x-request-id"] not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    (line,) = [line for line in log.read_text().splitlines() if answer.headers["x-request-id"] in line]
    found = json.loads(line)
    assert (found["status"], found["prompt_tokens"], found["output_tokens"]) == (
        200, usage["prompt_tokens"], usage["completion_tokens"],
    )  # fmt: skip
    assert found["key"].startswith("key-") and found["finish"] in ("stop", "length") and found["ttft_ms"] > 0
    assert "private" not in log.read_text()


def scraped(url, key):
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    lines = [line for line in text.splitlines() if line and not line.startswith("#") and "_bucket" not in line]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_with_keys_the_prefix_cache_is_off_unless_shared(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    file.create("one")
    for shared in (False, True):
        with Serving(ServeSettings(keys=file.path, share_prefix_cache=shared), "127.0.0.1", 0) as serving:
            assert serving.settings.engine.prefix_cache is shared
    with Serving(ServeSettings(keys=None), "127.0.0.1", 0) as serving:
        assert serving.settings.engine.prefix_cache


def test_an_address_for_others_needs_a_key_and_tls(tmp_path):
    with pytest.raises(UsageError, match="no key"):
        Serving(ServeSettings(keys=tmp_path / "none.json"), "0.0.0.0", 0)
    file = KeyFile(tmp_path / "keys.json")
    file.create("one")
    with pytest.raises(UsageError, match="unencrypted"):
        Serving(ServeSettings(keys=file.path), "0.0.0.0", 0)
    with Serving(ServeSettings(keys=file.path, behind_proxy=True), "0.0.0.0", 0):
        pass


# ── Admission ───────────────────────────────────────────────────────────────


@contextlib.contextmanager
def faked(folder, settings):
    """The same with the FakeEngine, which takes five milliseconds a step, so that what runs is still there."""
    model_folder(folder)
    (folder / "fake.json").write_text(json.dumps({"slow": 0.005}))
    bundle = SimpleNamespace(name="org/fake", digest="0" * 64, targets=["fake"], target_folder=lambda target: folder,
                             measured=lambda target: Report(()), manifest={}, folder=folder)  # fmt: skip
    with Serving(settings, "127.0.0.1", 0) as serving:
        server, _ = serving.server(bundle, Supervisor("fake", serving.settings.engine, serving.settings.care))
        with in_thread(server, serving.bound, serving.url):
            yield serving.url


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """One answer at a time, one request that waits, for six seconds at most."""
    settings = ServeSettings(keys=None, max_concurrent=1, max_queue=1, first_token_deadline=6)
    with faked(tmp_path_factory.mktemp("narrow"), settings) as url:
        yield url


@contextlib.contextmanager
def occupied(url, tokens=100_000):
    """A stream that runs meanwhile."""
    body = {"prompt": "a", "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_who_waits_too_long_is_told_and_who_is_too_many_is_told_at_once(narrow):
    body = {"prompt": "a", "max_tokens": 2}
    with concurrent.futures.ThreadPoolExecutor(2) as pool, occupied(narrow):
        waiting = pool.submit(post, narrow, body)
        time.sleep(0.5)
        refused = post(narrow, body)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1 and not waiting.done()
        late = waiting.result()
    assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
    assert int(late.headers["retry-after"]) >= 1
    assert post(narrow, body).status_code == 200  # the one that left has given its place back


def test_more_choices_than_places_never_fit(narrow):
    refused = post(narrow, {"prompt": "a", "max_tokens": 2, "n": 2})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"


def test_two_hundred_leave_at_once_and_one_is_answered(tmp_path):
    with faked(tmp_path, ServeSettings(keys=None)) as url:
        place = httpx.URL(url)
        body = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        sockets = [socket.create_connection((place.host, place.port), 10) for _ in range(200)]
        for each in sockets:
            each.sendall(request)
        sockets[0].recv(100)  # they run
        for each in sockets:
            each.close()
        began = time.monotonic()
        assert post(url, {"prompt": "a", "max_tokens": 5}, timeout=20).status_code == 200
        assert time.monotonic() - began < 15  # 5 s on a machine of one's own
        deadline = time.monotonic() + 10
        while (now := scraped(url, "none"))["lightship:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert now["lightship:num_requests_running"] == now["lightship:kv_blocks_reserved"] == 0


# ── Recovery ────────────────────────────────────────────────────────────────


def test_an_answer_outlives_its_engine(bundle_path):
    """Killed while it computes: the whole answer comes from the next engine, the same as ever."""
    before = set(worker_pids())
    with running(bundle_path, settings=ServeSettings(keys=None)) as url:
        body = {**LONG, "max_tokens": 400, "temperature": 0}
        expected = post(url, body).json()["choices"][0]["text"]
        (pid,) = set(worker_pids()) - before
        killing = threading.Timer(0.15, os.kill, (pid, signal.SIGKILL))
        killing.start()
        answer = post(url, body)
        killing.join()
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected
        wait_ready(url, 60)
        assert scraped(url, "none")["lightship:engine_restarts_total"] == 1


def test_reproducible_holds_under_load(bundle_path):
    """The same seed, alone and among others that sample something else."""
    engine = EngineSettings(**REPRODUCIBLE)
    asked = {**LONG, "max_tokens": 120, "seed": 5}
    with running(bundle_path, settings=ServeSettings(keys=None, engine=engine)) as url:
        alone = post(url, asked).json()["choices"][0]["text"]
        others = [{**LONG, "max_tokens": 150, "seed": seed, "prompt": f"Prompt {seed}"} for seed in range(12)]
        with concurrent.futures.ThreadPoolExecutor(14) as pool:
            running_others = [pool.submit(post, url, body) for body in others]
            among = [pool.submit(post, url, asked) for _ in range(2)]
            assert [each.result().json()["choices"][0]["text"] for each in among] == [alone, alone]
            assert len({each.result().json()["choices"][0]["text"] for each in running_others}) == 12


# ── Hostile surroundings ────────────────────────────────────────────────────


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """A day ahead and a year back while an answer runs: deadlines and the watchdog go by a clock that only runs on."""
    real = time.time
    settings = ServeSettings(keys=None, first_token_deadline=30, total_deadline=60, care=Care(stall=5))
    with faked(tmp_path, settings) as url, occupied(url, 800) as lines:
        for jump in (86_400, -31_536_000):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            assert post(url, {"prompt": "a", "max_tokens": 5}).status_code == 200
        events = [line for line in lines if line]
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length" and events[-1] == "data: [DONE]"
        assert httpx.get(f"{url}/livez").status_code == 200
        assert scraped(url, "none")["lightship:engine_restarts_total"] == 0


def hostile(place, chance):
    """One client that misbehaves in one of six ways."""
    body = json.dumps({"prompt": "a", "max_tokens": 5000, "stream": chance.random() < 0.7}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    way = chance.choice(["mid-head", "mid-body", "mid-stream", "reset", "half-closed", "garbage"])
    with contextlib.suppress(OSError), socket.create_connection((place.host, place.port), 5) as connection:
        sent = {"mid-head": whole[: chance.randrange(1, len(head))], "mid-body": whole[:-5],
                "garbage": chance.randbytes(200)}.get(way, whole)  # fmt: skip
        connection.sendall(sent)
        if way in ("mid-stream", "reset"):
            connection.recv(chance.randrange(1, 4000))
        if way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if way == "half-closed":
            connection.shutdown(socket.SHUT_WR)
            time.sleep(chance.random() / 10)


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.slow)])
def test_hostile_disconnects(tmp_path, seconds):
    """Eight clients that break off in every way; one beside them is always answered, and at the end nothing runs."""
    with faked(tmp_path, ServeSettings(keys=None)) as url:
        place, until = httpx.URL(url), time.monotonic() + seconds

        def spoil(seed):
            chance = random.Random(seed)
            count = 0
            while time.monotonic() < until:
                hostile(place, chance)
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            spoiling = [pool.submit(spoil, seed) for seed in range(8)]
            answered = 0
            while time.monotonic() < until:
                answer = post(url, {"prompt": "a", "max_tokens": 3}, timeout=20)
                assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "bcd"
                answered += 1
        assert answered >= 3 and sum(each.result() for each in spoiling) > 50
        deadline = time.monotonic() + 15
        while (now := scraped(url, "none"))["lightship:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert now["lightship:num_requests_running"] == now["lightship:num_requests_waiting"] == 0
        assert now["lightship:engine_restarts_total"] == 0
