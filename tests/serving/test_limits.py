"""What hostile clients send and do, each beside a healthy request that is answered all the same."""

import asyncio
import contextlib
import hashlib
import inspect
import json
import random
import socket
import struct
import threading
import time

import httpx
import pytest
from fastapi import Response
from uvicorn.protocols.http import h11_impl

from lightship.serving.limits import BODY_LIMIT, Limits
from lightship.serving.protocol import DoorProtocol
from lightship.serving.server import bind
from tests.serving.door import dial, healthy, model_folder, post, served, status_of, until_closed, wait_for

TIGHT = Limits(connections=20, head_seconds=1, body_seconds=1, write_seconds=1, linger_seconds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def url(folder):
    with served(folder, limits=TIGHT) as (url, app):

        @app.get("/big")
        async def big():
            return Response(b"x" * 3_000_000)

        yield url


@pytest.fixture(autouse=True)
def still_healthy(request):
    """After each hostile client the server answers, within its time."""
    yield
    if "url" in request.fixturenames:
        healthy(request.getfixturevalue("url"))


# ── Time ────────────────────────────────────────────────────────────────────


def dripping(connection, data, every=0.15):
    """Sends `data` byte by byte until the server closes or all is sent; returns what it answered."""
    stop = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            for place in range(len(data)):
                connection.sendall(data[place : place + 1])
                if stop.wait(every):
                    return

    sending = threading.Thread(target=drip)
    sending.start()
    try:
        return until_closed(connection)
    finally:
        stop.set()
        sending.join()


@pytest.mark.parametrize("begun", [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(url, begun):
    with dial(url) as connection:
        connection.sendall(begun)
        started = time.monotonic()
        healthy(url)
        assert status_of(until_closed(connection)) == (408, "request_timeout")
        assert time.monotonic() - started < 4


def test_headers_byte_by_byte_do_not_win_time(url):
    with dial(url) as connection:
        started = time.monotonic()
        found = dripping(connection, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"x" * 200)
        assert status_of(found) == (408, "request_timeout") and time.monotonic() - started < 4


def test_a_second_head_on_the_same_connection_has_its_time_too(url):
    with dial(url) as connection:
        for pause in (1.3, 0):  # an idle connection may stay for longer than a head may take
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_until(connection, b"}").startswith(b"HTTP/1.1 200 ")
            time.sleep(pause)
        started = time.monotonic()
        assert status_of(dripping(connection, b"GET /livez HTTP/1.1\r\n" + b"X" * 200)) == (408, "request_timeout")
        assert time.monotonic() - started < 4


def read_until(connection, end):
    """All that comes up to `end`, or to the end of the connection, which must be an orderly one."""
    found = b""
    while not found.endswith(end) and (piece := connection.recv(65536)):
        found += piece
    return found


@pytest.mark.parametrize("way", ["silent", "dripping", "chunks"])
def test_a_body_that_does_not_come_ends_the_connection(url, way):
    with dial(url) as connection:
        started = time.monotonic()
        if way == "chunks":
            connection.sendall(post(Transfer_Encoding="chunked"))
            found = dripping(connection, b"1\r\n \r\n" * 100)
        else:
            connection.sendall(post(b'{"prompt"', length=5000))
            found = dripping(connection, b" " * 200) if way == "dripping" else until_closed(connection)
        assert status_of(found) == (408, "request_timeout")
        assert time.monotonic() - started < 5


def test_a_client_that_does_not_read_is_left(url):
    """Its answer has no end, so that only the limit can end it."""
    with dial(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "a", "max_tokens": 1_000_000, "stream": True, "stop": ["never"]}).encode()
        connection.sendall(post(body))
        time.sleep(3)
        found = until_closed(connection)  # what the system still holds, and then the end
        assert b"200 OK" in found and b"[DONE]" not in found and len(found) < 1_000_000


def test_a_client_that_reads_slowly_is_served(url):
    """What waits for it is more than is good for twice as long as a client may take nothing."""
    with dial(url) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        size = 0
        for _ in range(12):
            size += len(connection.recv(150_000, socket.MSG_WAITALL))
            time.sleep(0.2)
        assert size < 3_000_000
        assert size + len(until_closed(connection)) > 3_000_000


# ── Size ────────────────────────────────────────────────────────────────────


def test_a_gigabyte_by_a_generator_is_cut_off_early(url):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(2**14):
            sent += 2**16
            yield b" " * 2**16

    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=endless(), headers=headers, timeout=20)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert sent < 32 * 2**20


def test_a_gigabyte_that_is_announced_is_refused_at_once(url):
    with dial(url) as connection:
        connection.sendall(post(length=2**30))
        started = time.monotonic()
        assert status_of(read_until(connection, b"}\n}")) == (413, "body_too_large")
        assert time.monotonic() - started < 1


def test_a_body_at_the_limit_is_read(url):
    body = b'{"prompt": "a", "max_tokens": 2}'
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=body + b" " * (BODY_LIMIT - len(body)), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nX-Big: " + b"x" * 2**20 + b"\r\n\r\n",
        b"GET /livez?" + b"x" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X-Big: x\r\n" * 100_000 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 70_000 + b"\r\n\r\n",  # arrives in one piece
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 100 + b"\r\n",
    ],
    ids=["1 MB line", "1 MB address", "1 MB of lines", "70 KB", "101 lines"],
)
def test_headers_beyond_the_limit(url, head):
    with dial(url) as connection:
        connection.sendall(head)  # to its end: the server throws away what it does not want
        assert status_of(read_until(connection, b"}\n}")) == (431, "headers_too_large")


def test_what_a_refused_client_still_sends_is_thrown_away(url):
    """A reset instead could cost it the answer."""
    with dial(url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-Big: " + b"x" * 70_000)
        assert status_of(read_until(connection, b"}\n}")) == (431, "headers_too_large")
        for _ in range(5):
            connection.sendall(b"x" * 10_000)
            time.sleep(0.05)


def test_headers_at_the_limit(url):
    with dial(url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: x\r\n" * 99 + b"\r\n")
        assert b"200 OK" in connection.recv(65536)


def test_a_body_in_a_million_pieces_is_refused(url):
    """Each costs the parser the same, so that 2 MB of them would hold the server up for a minute."""
    with dial(url) as connection:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            connection.sendall(post(Transfer_Encoding="chunked") + b"1\r\n \r\n" * 1_000_000)
        assert status_of(until_closed(connection)) == (413, "body_too_large")
        assert time.monotonic() - started < 5


def test_connections_are_bounded_and_free_again(url):
    wait_for(lambda: opens(url))
    held = [dial(url) for _ in range(25)]
    try:
        time.sleep(0.2)
        refused = [status_of(found) for found in map(waiting, held) if found]
        assert 5 <= len(refused) <= 7 and set(refused) == {(503, "unavailable")}
        far_beyond = [dial(url) for _ in range(30)]
        held += far_beyond
        assert b"" in map(until_closed, far_beyond)  # there is not even an answer
    finally:
        for connection in held:
            connection.close()
    wait_for(lambda: opens(url))


def waiting(connection):
    """What is there to be read."""
    connection.settimeout(0.01)
    with contextlib.suppress(TimeoutError):
        return connection.recv(65536)


def opens(url):
    try:
        return httpx.get(f"{url}/livez", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


# ── What is no HTTP ─────────────────────────────────────────────────────────

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NO_HTTP = {
    "garbage": b"\x00\x01\x02\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 300,
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/0.9": b"GET /\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "nul in a header": b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    "space in a name": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "no number": HEAD + b"Content-Length: 0x10\r\n\r\n",
    "chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "chunk of a huge size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 30 + b"\r\n",
    "chunk that ends wrong": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc",
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http_gets_an_envelope_and_the_door(url, sent):
    with dial(url) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert status_of(until_closed(connection)) == (400, "invalid_http")
        assert time.monotonic() - started < 0.8  # the end is told with the answer, not after a while


def test_other_transfer_encodings_are_not_guessed(url):
    with dial(url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        assert status_of(until_closed(connection)) == (501, "invalid_http")


def test_a_chunk_s_extension_beyond_the_limit(url):
    with dial(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 2**20)
        assert status_of(until_closed(connection))[0] in (400, 431)


def test_a_broken_chunk_while_the_answer_runs_ends_it(url, caplog):
    """There is no place for a second answer, and it is no failure of the server."""
    with dial(url) as connection:
        connection.sendall(HEAD.replace(b"application/json", b"text/plain") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"zz\r\n")
        assert b"HTTP/1.1" not in until_closed(connection)
    assert [record.getMessage() for record in caplog.records] == []


# ── Content ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=UTF-8"}, 200),
        ({"Content-Type": 'application/json;charset="utf-8"'}, 200),
        ({}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=" + "x" * 5000}, 415),
        ({"Content-Type": "application/vnd.api+json"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ([("Content-Type", "application/json"), ("Content-Type", "text/plain")], 415),
    ],
)
def test_one_content_type(url, headers, status):
    body = b'{"prompt": "a", "max_tokens": 2}'
    answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "unsupported_content_type"


TEXTS = {
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16-le"),
    "utf-16 with a mark": '{"prompt": "a"}'.encode("utf-16"),
    "utf-32": '{"prompt": "a"}'.encode("utf-32-be"),
    "a half surrogate in utf-8": b'{"prompt": "\xed\xa0\x80"}',
    "nul": b'{"prompt": "a\x00"}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "nan deep inside": b'{"prompt": "a", "user": [{"x": [NaN]}]}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "a huge number": b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}",
    "a huge list of huge numbers": b'{"prompt": [' + b"9" * 4000 + b"," + b"1e999]}",
    "brackets": b"[" * BODY_LIMIT,
    "braces": b'{"a":' * (BODY_LIMIT // 5),
    "brackets that close": b'{"prompt": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "brackets behind a string": b'{"a": "\\\\\\"", "prompt": ' + b"[" * 65 + b"]" * 65 + b"}",
    "no end": b'{"prompt": "' + b"\\" * 1_000_001,
    "a list of the wrong kind": json.dumps({"prompt": ["a"] * 300_000 + [1]}).encode(),
    "lists of the wrong kind": b'{"prompt": [' + b"[]," * 600_000 + b"[]]}",
    "ids of the wrong kind": b'{"prompt": [[' + b"true," * 400_000 + b"1]]}",
    "fields nobody knows": json.dumps({f"x{number}": 1 for number in range(150_000)}).encode(),
    "nothing": b" ",
    "a number": b"1",
    "null": b"null",
    "two": b'{"prompt": "a"}{"prompt": "b"}',
}


@pytest.mark.parametrize("body", TEXTS.values(), ids=TEXTS)
def test_what_is_no_json_is_refused_at_once(url, body):
    started = time.monotonic()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers, timeout=10)
    assert answer.status_code == 400 and len(answer.content) < 600
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - started < 2


def test_brackets_and_words_in_texts_are_just_text(url):
    """What looks like too much nesting, or like NaN, is a prompt here."""
    for text in (":" * 30_000, "[" * 1000, '"NaN" \\ "[[' * 100, "Infinity\\", '\\"' * 99 + "{" * 99):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": text, "max_tokens": 1})
        assert answer.status_code == 200, text


# ── Clients that leave ──────────────────────────────────────────────────────


def test_sockets_closed_at_any_byte_leave_nothing_behind(url):
    body = json.dumps({"prompt": "a", "max_tokens": 1_000_000, "stop": ["never"], "stream": True}).encode()
    requests = [post(body), post(b"{" * 70), post(b"x" * 100, length=3_000_000),
                post(Transfer_Encoding="chunked") + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
                post(body) * 3, post(Expect="100-continue", length=10)]  # fmt: skip
    choose = random.Random(0)
    for number in range(150):
        request = choose.choice(requests)
        with dial(url) as connection:
            connection.sendall(request[: choose.randint(0, len(request))])
            if number % 3:
                with contextlib.suppress(TimeoutError):
                    connection.settimeout(0.01)
                    connection.recv(choose.randint(1, 500))
            if number % 2:  # a reset instead of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if number % 30 == 0:
            healthy(url)
    healthy(url)


def test_a_client_that_stops_sending_and_reads_is_answered(url):
    """A half-closed connection is not one that was left."""
    with dial(url) as connection:
        connection.sendall(post(b'{"prompt": "a", "max_tokens": 2}', Connection="close"))
        assert b'"bc"' in until_closed(connection)


def test_small_answers_are_sent_at_once():
    """Without TCP_NODELAY every answer but the first on a connection waits 40 ms for an acknowledgement."""

    async def accepted():
        found = asyncio.get_running_loop().create_future()

        async def look(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as bound:
            async with await asyncio.start_server(look, sock=bound):
                _, writer = await asyncio.open_connection(*bound.getsockname())
                writer.close()
                return await asyncio.wait_for(found, 5)

    assert asyncio.run(accepted())


# ── uvicorn ─────────────────────────────────────────────────────────────────

READ = "40e2a5b206a81d09"
RELIED_ON = [
    *(getattr(h11_impl.H11Protocol, name) for name in (
        "__init__", "connection_made", "connection_lost", "eof_received", "_unset_keepalive_if_required",
        "data_received", "handle_events", "send_400_response", "on_response_complete", "shutdown", "pause_writing",
        "resume_writing", "timeout_keep_alive_handler")),
    h11_impl.RequestResponseCycle.send, h11_impl.RequestResponseCycle.receive,
    h11_impl.RequestResponseCycle.run_asgi, h11_impl.FlowControl,
]  # fmt: skip


def test_uvicorn_is_the_one_that_was_read():
    """`DoorProtocol` hooks into these. When one has changed, read it again against protocol.py, then note its hash."""
    source = "".join(inspect.getsource(part) for part in RELIED_ON)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == READ


def test_what_is_overridden_exists():
    own = {name for name, value in vars(DoorProtocol).items() if callable(value) and not name.startswith("_")}
    assert own <= set(dir(h11_impl.H11Protocol))
