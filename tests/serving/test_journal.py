"""Every request leaves one line, however it ends, and a log that cannot be written costs no request."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import subprocess
import threading
import time

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from lightship.errors import Overloaded
from lightship.serving import errors
from lightship.serving.admission import Admission
from lightship.serving.connection import Stream, unless_gone
from lightship.serving.journal import Journal, Sink, journal_to
from lightship.serving.server import bind, url_of
from lightship.serving.ticket import Demand, Limits

SECRET = "what the client wrote"


def api() -> FastAPI:
    app = FastAPI()
    errors.install(app)

    @app.get("/item/{name}")
    async def fine(name: str, request: Request) -> dict[str, str]:
        request.state.record.note_prompt(SECRET)
        request.state.record.prompt_tokens = 3
        return {"id": request.state.id}

    @app.get("/own")
    async def own_id() -> Response:
        return Response(headers={"X-Request-ID": "the route's"})

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError(SECRET)

    @app.get("/busy")
    async def busy() -> None:
        raise Overloaded("no room", 7)

    @app.get("/slow")
    async def slow(request: Request) -> None:
        await unless_gone(request, asyncio.sleep(30))

    async def drops():
        while True:
            yield "data: x\n\n"
            await asyncio.sleep(0.01)

    @app.get("/stream")
    async def stream() -> Response:
        return Stream(drops())

    return app


@contextlib.contextmanager
def journalled(target, **options):
    statuses = []
    logger, sink = journal_to(target)
    app = Journal(api(), logger, answered=statuses.append, **options)
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield url_of(bound), statuses, sink
        finally:
            server.should_exit = True
            thread.join(10)
            sink.stop()


def lines_of(path, count):
    """The lines, once there are as many."""
    deadline = time.monotonic() + 5
    while (text := path.read_text()).count("\n") < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "lines"
    with journalled(path) as (url, statuses, _):
        yield url, path, statuses


@pytest.fixture
def log(live):
    """Lines of this test alone."""
    url, path, statuses = live
    os.truncate(path, 0)  # the file is appended to, so that it can be cut while it is written
    statuses.clear()
    return url, path, statuses


def test_a_line_and_what_is_in_it(log):
    url, path, statuses = log
    answer = httpx.get(f"{url}/item/{SECRET}")
    (line,) = lines_of(path, 1)
    assert answer.headers["x-request-id"] == answer.json()["id"] == line["id"]
    assert line["id"].startswith("req-") and len(line["id"]) == 28
    assert (line["route"], line["method"], line["status"], line["key"]) == ("/item/{name}", "GET", 200, None)
    assert line["prompt_tokens"] == 3 and 0 < line["total_ms"] < 5000 and not line["client_left"]
    assert SECRET not in path.read_text() and statuses == [200]


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-1.2_Z", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("a/b", False), ("é", False),
     ('"}{', False), ("", False)],
)  # fmt: skip
def test_ids_of_clients(log, given, taken):
    answer = httpx.get(f"{log[0]}/item/x", headers={"X-Request-Id": given.encode()})
    ids = answer.headers.get_list("x-request-id")
    assert len(ids) == 1 and (ids[0] == given) == taken
    assert lines_of(log[1], 1)[0]["id"] == ids[0]


def test_two_ids_are_none(log):
    answer = httpx.get(f"{log[0]}/item/x", headers=[("X-Request-Id", "one"), ("X-Request-Id", "two")])
    assert answer.headers["x-request-id"].startswith("req-") and len(lines_of(log[1], 1)) == 1


def test_there_is_one_id_only(log):
    answer = httpx.get(f"{log[0]}/own", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"] and len(lines_of(log[1], 1)) == 1


def test_leaving_after_the_answer_is_no_leaving(tmp_path):
    """An application may go on listening when it has answered; then the end of the connection means nothing."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.disconnect"

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    logger, sink = journal_to(tmp_path / "lines")
    asyncio.run(Journal(app, logger)({"type": "http", "method": "GET", "headers": []}, receive, send))
    sink.stop()
    (line,) = lines_of(tmp_path / "lines", 1)
    assert (line["status"], line["client_left"]) == (204, False)


def test_no_route_keeps_its_place(tmp_path):
    admission = Admission(Limits(blocks=1))

    async def app(scope, receive, send):
        scope["state"]["record"].ticket = await admission.enter(Demand("a", (7,), (3,)))
        raise RuntimeError("and nobody closes it")

    async def nothing(*message):
        pass

    logger, sink = journal_to(tmp_path / "lines")
    scope = {"type": "http", "method": "GET", "headers": []}
    for _ in range(2):
        with pytest.raises(RuntimeError):
            asyncio.run(Journal(app, logger)({**scope}, nothing, nothing))
    sink.stop()
    assert [line["finish"] for line in lines_of(tmp_path / "lines", 2)] == ["abort", "abort"]
    assert admission.snapshot().running == 0


@pytest.mark.parametrize(
    ("route", "status", "pattern"), [("/boom", 500, "/boom"), ("/busy", 429, "/busy"), ("/none", 404, None)]
)
def test_errors_have_an_id_and_a_line(log, route, status, pattern):
    url, path, statuses = log
    answer = httpx.get(f"{url}{route}", headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
    (line,) = lines_of(path, 1)
    assert (line["status"], line["route"], line["id"]) == (status, pattern, "mine") and statuses == [status]
    assert SECRET not in path.read_text()


def test_clients_that_leave(log):
    url, path, statuses = log
    with httpx.stream("GET", f"{url}/stream") as answer:
        next(answer.iter_lines())
    (line,) = lines_of(path, 1)
    assert (line["route"], line["status"], line["client_left"]) == ("/stream", 200, True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{url}/slow", timeout=0.1)
    line = lines_of(path, 2)[1]
    assert (line["route"], line["status"], line["client_left"]) == ("/slow", 499, True)
    assert line["total_ms"] < 5000 and statuses == [200, 499]


def test_prompts_only_when_they_are_asked_for(tmp_path):
    with journalled(tmp_path / "lines", log_prompts=True) as (url, _, _):
        httpx.get(f"{url}/item/x")
        assert lines_of(tmp_path / "lines", 1)[0]["prompt"] == SECRET


# ── Logs that cannot be written ─────────────────────────────────────────────


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_full_device_fails_no_request_and_its_end_is_told(tmp_path):
    """/dev/full answers every write with ENOSPC; then a file takes its place under the same descriptor."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with journalled(descriptor) as (url, _, sink):
        for _ in range(3):
            assert httpx.get(f"{url}/item/x").status_code == 200
        wait_for(lambda: sink.dropped == 3)
        with open(tmp_path / "lines", "wb") as file:
            os.dup2(file.fileno(), descriptor)
        assert httpx.get(f"{url}/item/x").status_code == 200
        told, line = lines_of(tmp_path / "lines", 2)
        assert (told["event"], told["lines"]) == ("log_lines_dropped", 3) and line["status"] == 200
        httpx.get(f"{url}/item/x")
        assert "event" not in lines_of(tmp_path / "lines", 3)[2]
    os.close(descriptor)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine mounts nothing for us")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk_tears_no_line(small_disk):
    """The disk fills in the middle of a line, then has room again: every whole line that is read back is JSON."""
    (small_disk / "filler").write_bytes(b"x" * 60 * 1024)
    logger, sink = journal_to(small_disk / "lines")
    for number in range(100):
        logger.info(json.dumps({"number": number, "padding": "x" * 100}))
    wait_for(lambda: sink._lines.empty() and sink.dropped > 50)
    dropped = sink.dropped
    (small_disk / "filler").unlink()
    for number in range(100, 110):
        logger.info(json.dumps({"number": number}))
    sink.stop()
    lines = (small_disk / "lines").read_text().splitlines()
    torn = [line for line in lines if not line.endswith("}")]
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(torn) <= 1 and [line["number"] for line in whole[-10:]] == list(range(100, 110))
    assert whole[-11]["lines"] == dropped == 100 - (len(whole) - 11)


def test_a_stuck_pipe_delays_nobody():
    reading, writing = os.pipe()
    sink = Sink(writing, room=10)
    logger = logging.Logger("stuck")
    logger.addHandler(sink)
    begun = time.monotonic()
    for _ in range(100):
        logger.info("x" * 2000)  # a pipe holds 64 KiB
    assert time.monotonic() - begun < 2
    logger.info("y" * 2000)
    assert 100 - 10 - 35 <= sink.dropped <= 101 - 10
    collected = b""
    while b'"lines": ' not in collected:  # reading makes room again, and the loss is told
        collected += os.read(reading, 1 << 16)
        logger.info("z")
    sink.stop()
    os.close(writing)
    os.close(reading)
    assert b"log_lines_dropped" in collected


def test_closing_writes_what_waits(tmp_path):
    logger, sink = journal_to(tmp_path / "lines")
    for number in range(500):
        logger.info("%d", number)
    sink.stop()
    assert (tmp_path / "lines").read_text().split() == [str(number) for number in range(500)]
