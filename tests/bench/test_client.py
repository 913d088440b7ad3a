"""One request: its times against the server's log, and every way in which it can end badly."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lightship.bench.client import Asked, ask
from lightship.bench.prompts import Manner
from lightship.bench.wire import Door, Place
from lightship.errors import UsageError
from tests.bench.scripted import Plan, Scripted, virtually


def asked(number=0, tokens=5, exact=True, chat=False):
    return Manner("m", chat).asked(number, "Hello", tokens, exact)


def seen_with(plan, request=None, timeout=60.0, keep_alive=True):
    """(what the client saw, what the server logged) of one request that was due 2 s before it was sent."""

    async def main():
        server = Scripted(lambda number, body: plan)
        async with server.open() as url:
            await asyncio.sleep(2)
            door = Door(Place.of(url), keep_alive)
            clock = asyncio.get_running_loop().time
            seen = await ask(door, request or asked(), clock, 0.0, timeout)
            door.close()
            return seen, server.log[0]

    return virtually(main())


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_times_are_those_of_the_servers_log(framing, split, chat):
    """The first event of a chat has a role and no text: it must not count as the first token."""
    seen, log = seen_with(Plan(first=0.5, each=0.125, framing=framing, split=split), asked(chat=chat))
    assert (seen.outcome, seen.tokens, seen.counted, seen.finish) == ("whole", 5, "usage", "length")
    assert (seen.sent, log.arrived) == (2.0, 2.0)
    assert (seen.first, seen.last) == (log.pieces[0], log.pieces[-1]) == (2.5, 3.0)
    assert seen.ttft == 2.5 and seen.delay == 2.0  # from when it was due, which includes how late it was sent
    assert seen.tpot == pytest.approx(0.125) and seen.e2e == 3.0
    assert log.body["stream"] and log.body["stream_options"] == {"include_usage": True}


def test_without_usage_pieces_are_counted():
    seen, _ = seen_with(Plan(usage=False))
    assert (seen.outcome, seen.tokens, seen.counted) == ("whole", 5, "pieces")


def test_a_piece_may_hold_several_tokens():
    seen, log = seen_with(Plan(per_piece=2, each=0.5))
    assert (seen.outcome, seen.tokens, len(log.pieces)) == ("whole", 5, 3)
    assert seen.tpot == pytest.approx(1.0 / 4)
    seen, _ = seen_with(Plan(per_piece=2, usage=False))
    assert (seen.outcome, seen.tokens) == ("whole", 3)  # ended by length, so it has what was asked for


def test_an_answer_whose_tokens_show_no_text_is_no_fast_one():
    seen, log = seen_with(Plan(silent=True, first=1.0, each=0.5))
    assert seen.first == seen.last == log.ended == 5.0


def test_tokens_without_text_are_seen_where_the_usage_comes_with_them():
    request = Manner("m", continuous=True).asked(0, "Hello", 5, True)
    seen, log = seen_with(Plan(silent=True, first=1.0, each=0.5), request)
    assert (seen.first, seen.last, seen.tokens) == (log.pieces[0], log.pieces[-1], 5)
    assert seen.outcome == "whole" and seen.first < log.ended


@pytest.mark.parametrize(
    ("plan", "outcome", "reason"),
    [
        (Plan(tokens=3, finish="stop"), "stopped", None),
        (Plan(tokens=3), "short", "3 of 5 tokens"),
        (Plan(tokens=3, finish="content_filter"), "short", "content_filter"),
        (Plan(tokens=0, finish="stop"), "short", "no token"),
        (Plan(breaks=2), "broken", "IncompleteReadError"),
        (Plan(breaks=2, framing="close"), "broken", "without an end"),
        (Plan(breaks=0), "broken", "IncompleteReadError"),
        (Plan(error=2), "failed", "the engine died"),
        (Plan(status=429, headers={"Retry-After": 1}), "refused", "no"),
        (Plan(status=429), "refused", "no"),
        (Plan(status=503, headers={"Retry-After": 1}), "refused", "no"),
        (Plan(status=503), "failed", "no"),
        (Plan(status=500, body=b"<html>oh</html>"), "failed", "<html>oh"),
        (Plan(status=404, body=b""), "failed", "status 404"),
        (Plan(kind="application/json"), "failed", "not streamed"),
    ],
)
def test_what_is_no_whole_answer(plan, outcome, reason):
    seen, _ = seen_with(plan)
    assert seen.outcome == outcome
    assert reason is None or reason in seen.reason
    assert seen.retry_after == ("Retry-After" in plan.headers)
    assert seen.e2e is None
    if outcome != "stopped":
        assert seen.ttft is None and seen.tpot is None and not seen.answered


def test_where_the_end_is_the_models_choice_it_is_whole():
    seen, _ = seen_with(Plan(tokens=3, finish="stop"), asked(exact=False))
    assert seen.outcome == "whole" and seen.e2e is not None
    seen, _ = seen_with(Plan(tokens=3, finish="length"), asked(exact=False))
    assert seen.outcome == "short"


def test_a_timeout():
    seen, log = seen_with(Plan(first=10, each=10), timeout=25)
    assert (seen.outcome, seen.ended) == ("timeout", 27.0)
    assert seen.first == log.pieces[0] and seen.ttft is None


def test_leaving_closes_the_connection():
    seen, _ = seen_with(Plan(), replace(asked(), leave_after=2))
    assert (seen.outcome, seen.tokens) == ("left", 2) and seen.ttft is None


def test_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        door = Door(Place.of(f"http://127.0.0.1:{free.getsockname()[1]}"))
        seen = virtually(ask(door, asked(), lambda: 0.0, 0.0, 5))
    assert seen.outcome == "broken" and "ConnectionRefusedError" in seen.reason and seen.status is None


def test_what_is_not_http():
    async def main():
        async def talk(reader, writer):
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        door = Door(Place.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        seen = await ask(door, asked(), lambda: 0.0, 0.0, 5)
        server.close()
        return seen

    assert virtually(main()).outcome == "broken"


# ── Connections ─────────────────────────────────────────────────────────────


def connections(plans, keep_alive=True, pause=0.0):
    """How many connections the server saw for requests one after the other."""

    async def main():
        server = Scripted(lambda number, body: plans[number])
        async with server.open() as url:
            door = Door(Place.of(url), keep_alive, key="secret")
            outcomes = []
            for number in range(len(plans)):
                outcomes.append((await ask(door, asked(number), lambda: 0.0, 0.0, 60)).outcome)
                await asyncio.sleep(pause)
            door.close()
            return server, outcomes

    server, outcomes = virtually(main())
    assert all("Authorization: Bearer secret\r\n" in logged.head for logged in server.log)
    return server.connections, outcomes


def test_a_connection_is_used_again():
    assert connections([Plan(), Plan(status=429), Plan()]) == (1, ["whole", "refused", "whole"])


def test_no_keep_alive():
    assert connections([Plan(), Plan()], keep_alive=False) == (2, ["whole", "whole"])


def test_what_broke_or_ends_with_its_answer_is_not_used_again():
    assert connections([Plan(framing="close"), Plan(breaks=1), Plan()]) == (3, ["whole", "broken", "whole"])


def test_a_connection_that_was_idle_for_long_is_not_trusted():
    assert connections([Plan(), Plan()], pause=3.0) == (2, ["whole", "whole"])


@pytest.fixture
def certificate(tmp_path):
    """(certificate, key) for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(),
                                      now - datetime.timedelta(1), now + datetime.timedelta(1))  # fmt: skip
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = builder.add_extension(address, False).sign(key, hashes.SHA256())
    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                          serialization.NoEncryption()))  # fmt: skip
    return certificate, private


@pytest.mark.parametrize("trusted", [True, False])
def test_tls(certificate, monkeypatch, trusted):
    """A certificate of one's own is trusted where $SSL_CERT_FILE names it, and not otherwise."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def main():
        async with Scripted().open(tls) as url:
            door = Door(Place.of(url))
            seen = await ask(door, asked(), lambda: 0.0, 0.0, 60)
            door.close()
            await asyncio.sleep(0.1)  # in virtual time: for the good-bye of TLS
            return seen

    seen = virtually(main())
    assert seen.outcome == ("whole" if trusted else "broken")
    assert trusted or "CERTIFICATE_VERIFY_FAILED" in seen.reason


# ── Addresses ───────────────────────────────────────────────────────────────


def test_addresses():
    assert Place.of("http://127.0.0.1:8000/v1/") == Place("127.0.0.1", 8000)
    assert Place.of("http://example.test/llm/v1") == Place("example.test", 80, "/llm")
    assert Place.of("http://[::1]:81").name == "[::1]:81"
    secure = Place.of("https://example.test")
    assert secure.port == 443 and secure.tls is not None
    assert b"POST /llm/v1/completions HTTP/1.1" in Door(Place.of("http://a/llm")).request("POST", "/v1/completions")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://me:secret@a", "http://a:99999"])
def test_what_is_no_address(url):
    with pytest.raises(UsageError) as caught:
        Place.of(url)
    assert "secret" not in str(caught.value)


def test_the_key_is_not_shown():
    assert "secret" not in repr(Door(Place("a", 1), key="secret"))


def test_fields_that_a_server_may_not_know_can_be_left_out():
    body = Manner("m", ignore_eos=False, usage=False).asked(0, [1, 2], 5, True).body
    assert b"ignore_eos" not in body and b"stream_options" not in body and b'"prompt": [1, 2]' in body
    assert isinstance(asked(), Asked) and b'"ignore_eos": true' in asked().body
