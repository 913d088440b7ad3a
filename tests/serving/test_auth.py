"""Nothing is answered without a key, on any route, known or not, and nothing by a key that may not."""

import asyncio
import contextlib
import http.client
import json
import random
import string
import subprocess
import time

import httpx
import pytest

from lightship.errors import RequestError, UsageError
from lightship.serving.auth import Doorkeeper, check_exposure, check_tls, is_loopback, needed, shares_prefix_cache
from lightship.serving.client import stream_chat
from lightship.serving.errors import OPEN
from lightship.serving.keys import KeyFile, KeyRing
from lightship.serving.limits import Limits
from lightship.serving.protocol import DoorLoop
from lightship.serving.server import bind
from tests.serving.door import dial, healthy, model_folder, post, served, status_of, until_closed

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def keys(file):
    return {scope: file.create(scope, [scope])[1] for scope in ("use", "metrics", "admin")}


@pytest.fixture(scope="module")
def server(folder, file, keys):
    with served(folder, KeyRing(file, interval=0)) as (url, app):

        @app.post("/admin/drain")
        async def drain():
            return {}

        yield url, app


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


@contextlib.contextmanager
def asking(url):
    """A function (method, path, headers) → status, headers, body that asks for exactly that path, as httpx does not."""
    address = httpx.URL(url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=10)

    def ask(method, path, headers=None):
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    with contextlib.closing(connection):
        yield ask


def paths_of(app):
    """Every route, its parameters filled in; what mounts and included routers hold too."""
    for route in app.routes:
        yield route.path.replace("{name:path}", "org/fake").replace("{name}", "fake")


def strange_paths():
    letters = random.Random(0)
    for _ in range(40):
        yield "/" + "".join(letters.choices(string.ascii_letters + "/._-%:~", k=letters.randint(0, 20))).replace(
            "%", ""
        )
    yield from ("/docs", "/redoc", "/openapi.json", "/livez/", "//livez", "/livez/..", "/readyz/x", "/LIVEZ",
                "/livez%00", "/%6civez/x", "/v1/../livez", "/metrics", "/metrics/", "/admin", "/admin/x",
                "//admin/drain", "/health/", "/healthz", "/favicon.ico", "/.well-known/x")  # fmt: skip


def test_every_route_and_every_other_path_needs_a_key(server, keys):
    url, app = server
    routes = set(paths_of(app))
    assert {"/v1/chat/completions", "/v1/models/org/fake", "/openapi.json", "/metrics", *OPEN} <= routes
    with asking(url) as ask:
        for path in [*routes, *strange_paths()]:
            for method in METHODS:
                status, headers, body = ask(method, path)
                if path in OPEN and method in ("GET", "HEAD"):
                    assert status in (200, 405)  # HEAD where the route has none
                    continue
                assert status == 401, (method, path)
                assert headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_key_of_the_wrong_scope_is_refused_everywhere(server, keys):
    url, app = server
    paths = {*paths_of(app), *strange_paths()} - {*OPEN}
    with asking(url) as ask:
        for path in paths:
            for method in ("GET", "POST", "DELETE"):
                first = path.split("/")[1]
                wrong = {"metrics": "use", "admin": "metrics"}.get(first, "metrics")
                status, _, body = ask(method, path, bearer(keys[wrong]))
                assert status == 403 and json.loads(body)["error"]["code"] == "missing_scope", (method, path)
                assert ask(method, path, bearer(keys["admin"]))[0] not in (401, 403), (method, path)
        assert ask("POST", "/admin/drain", bearer(keys["use"]))[0] == 403
        assert ask("GET", "/metrics", bearer(keys["metrics"]))[0] == 200
    healthy(url, **bearer(keys["use"]))


def test_paths_and_their_scopes():
    assert needed("/admin") == needed("/admin/keys/x") == ("admin",)
    assert needed("/metrics") == needed("/metrics/") == ("metrics", "admin")
    for path in ("/v1/models", "", "*", "/", "//admin", "/administer", "/v1/admin"):
        assert needed(path) == ("use", "admin")


def test_the_refusal_is_byte_for_byte_openai_s(server):
    answer = httpx.get(server[0] + "/v1/models", headers=bearer("ls-wrong"))
    assert answer.status_code == 401 and answer.headers["content-type"] == "application/json"
    assert answer.text == (
        '{\n  "error": {\n    "message": "Incorrect API key provided",\n    "type": "invalid_request_error",\n'
        '    "param": null,\n    "code": "invalid_api_key"\n  }\n}'
    )
    missing = httpx.get(server[0] + "/v1/models").json()["error"]
    assert missing["message"].startswith("You didn't provide an API key") and missing["code"] == "invalid_api_key"


def test_openai_s_client_is_let_in_and_knows_the_refusal(server, keys):
    import openai

    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=keys["use"], max_retries=0)
    assert client.models.list().data[0].id == "org/fake"
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="sk-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=keys["metrics"]).models.list()


def test_how_a_key_may_be_given(server, keys):
    url, key = f"{server[0]}/v1/models", keys["use"]
    good = [bearer(key), {"Authorization": f"bearer   {key}"}, {"X-API-Key": key},
            {"Authorization": f"Bearer {key}", "X-API-Key": "wrong"}]  # fmt: skip
    bad = [{"Authorization": key}, {"Authorization": f"Basic {key}"}, {"Authorization": "Bearer"},
           {"Authorization": "Bearer", "X-API-Key": key}, {"Authorization": f"Bearer {key}x"}, {"X-API-Key": ""},
           [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")],
           [("X-API-Key", key), ("X-API-Key", key)], {"Authorization": f"Bearer {key},Bearer {key}"},
           {"Cookie": f"key={key}"}, [("Authorization", b"Bearer \xff\xfe")]]  # fmt: skip
    for headers in good:
        assert httpx.get(url, headers=headers).status_code == 200, headers
    for headers in bad:
        assert httpx.get(url, headers=headers).status_code == 401, headers
    assert httpx.get(f"{url}?api_key={key}").status_code == 401  # addresses end up in logs


def test_no_body_is_read_before_the_key(server):
    """The answer is there while the body is not, and the connection does not outlive it."""
    with dial(server[0]) as connection:
        started = time.monotonic()
        connection.sendall(post(length=1_000_000))
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert time.monotonic() - started < 1
        assert until_closed(connection) is not None


def test_a_revoked_key_ends_at_once_and_a_new_one_works(server, file):
    url = server[0]
    _, secret = file.create("temporary")
    healthy(url, **bearer(secret))
    file.revoke("temporary")
    assert httpx.get(f"{url}/v1/models", headers=bearer(secret)).status_code == 401


def test_a_broken_file_keeps_everybody_out_but_the_server_lives(server, file, keys):
    url, content = server[0], file.path.read_bytes()
    file.path.write_bytes(b"{")
    try:
        assert httpx.get(f"{url}/v1/models", headers=bearer(keys["admin"])).status_code == 401
        assert httpx.get(f"{url}/livez").status_code == 200
    finally:
        file.path.write_bytes(content)
    healthy(url, **bearer(keys["use"]))


def test_routes_find_the_key_in_the_state(file, keys):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["key"])

    async def call(ring, path, headers=()):
        scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}

        async def send(message):
            seen.append(message.get("status"))

        await Doorkeeper(app, ring)(scope, None, send)

    ring = KeyRing(file)
    asyncio.run(call(ring, "/v1/models", [(b"authorization", f"Bearer {keys['use']}".encode())]))
    asyncio.run(call(ring, "/livez"))
    asyncio.run(call(KeyRing(None), "/v1/models"))
    assert [getattr(each, "name", each) for each in seen] == ["use", None, None]


def test_behind_a_prefix_the_scopes_are_those_of_the_route(file, keys):
    """A server that mounts the app below a prefix puts the prefix into the path."""
    found = []

    async def app(scope, receive, send):
        found.append(200)

    async def send(message):
        found.append(message.get("status"))

    async def call(path, key):
        headers = [(b"authorization", f"Bearer {keys[key]}".encode())]
        scope = {"type": "http", "method": "GET", "path": path, "root_path": "/llm", "headers": headers}
        await Doorkeeper(app, KeyRing(file))(scope, None, send)
        return next(status for status in found if status)

    for path, key, status in (("/llm/metrics", "use", 403), ("/llm/metrics", "metrics", 200), ("/llm/x", "use", 200)):
        found.clear()
        assert asyncio.run(call(path, key)) == status


# ── Browsers ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1"])
def test_no_page_of_another_origin_may_read_or_ask(server, keys, origin):
    url = server[0]
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    for path in ("/v1/chat/completions", "/v1/models", "/livez", "/nowhere"):
        for headers in (asked, {**asked, **bearer(keys["use"])}):
            answer = httpx.options(url + path, headers=headers)
            assert answer.status_code in (401, 404, 405)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = httpx.get(url + path, headers={"Origin": origin, **bearer(keys["use"])})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_server_without_keys_answers_to_the_name_of_this_machine_only(folder):
    with served(folder, local=True) as (url, _):
        port = httpx.URL(url).port
        for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "127.9.9.9"):
            assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "",
                     "192.0.2.1", "[::1"):  # fmt: skip
            answer = httpx.get(f"{url}/v1/models", headers={"Host": host})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed", host
        assert httpx.get(f"{url}/livez", headers={"Host": "10.0.0.1"}).status_code == 200  # probes name the pod


# ── Where it may be bound ───────────────────────────────────────────────────


def test_what_may_be_bound(tmp_path, file, keys):
    none, some = KeyRing(KeyFile(tmp_path / "none.json")), KeyRing(file)
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "LocalHost.", "::1", "::ffff:127.0.0.1"):
        check_exposure(host, none, tls=False, behind_proxy=False)
        with pytest.raises(UsageError, match=r"a proxy .* no key"):
            check_exposure(host, none, tls=False, behind_proxy=True)
        check_exposure(host, some, tls=False, behind_proxy=True)
    for host in ("0.0.0.0", "", "::", "192.0.2.1", "example.org", "::ffff:192.0.2.1", "127.0.0.1.nip.io", "localhosts"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="no key") as caught:
            check_exposure(host, none, tls=True, behind_proxy=True)
        assert "lightship keys create" in caught.value.hint
        with pytest.raises(UsageError, match="unencrypted") as caught:
            check_exposure(host, some, tls=False, behind_proxy=False)
        assert "--tls-cert" in caught.value.hint and "--behind-proxy" in caught.value.hint
        check_exposure(host, some, tls=True, behind_proxy=False)
        check_exposure(host, some, tls=False, behind_proxy=True)


def test_the_prefix_cache_is_one_users_own_unless_it_is_shared_on_purpose(tmp_path, file, keys):
    none = KeyRing(KeyFile(tmp_path / "none.json"))
    assert shares_prefix_cache(none, asked=False)
    assert not shares_prefix_cache(KeyRing(file), asked=False)
    assert shares_prefix_cache(KeyRing(file), asked=True)


# ── TLS ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_the_doors_hold_over_tls_too(folder, file, keys, certificate):
    import ssl

    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(served(folder, KeyRing(file), tls=certificate))
        client = stack.enter_context(httpx.Client(base_url=url.replace("http:", "https:"), verify=trusted))
        assert client.get("/v1/models").status_code == 401
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=bearer(keys["use"]))
        assert answer.status_code == 200
        with dial(url) as plain:  # no answer in the clear
            plain.sendall(post(b"{}"))
            assert b"HTTP" not in until_closed(plain)


def test_who_never_begins_with_tls_is_cut_off(folder, file, keys, certificate, monkeypatch):
    monkeypatch.setattr(DoorLoop, "handshake_seconds", 0.5)
    with served(folder, KeyRing(file), tls=certificate) as (url, _), dial(url) as silent:
        silent.settimeout(10)  # asyncio's own limit is 60 s
        assert until_closed(silent) == b""


def test_a_port_for_metrics_has_the_same_doors(folder, file, keys, certificate):
    """Locked, encrypted and limited as the API is, and the API has no metrics then."""
    import ssl

    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    limits = Limits(head_seconds=0.5)
    with bind("127.0.0.1", 0) as own, served(folder, KeyRing(file), limits, tls=certificate, metrics=own) as (url, _):
        address = f"https://127.0.0.1:{own.getsockname()[1]}"
        with httpx.Client(verify=trusted) as client:
            assert client.get(f"{address}/metrics").status_code == 401
            assert client.get(f"{address}/metrics", headers=bearer(keys["use"])).status_code == 403
            answer = client.get(f"{address}/metrics", headers=bearer(keys["metrics"]))
            assert answer.status_code == 200 and "lightship:" in answer.text and "server" not in answer.headers
            beside = client.get(url.replace("http:", "https:") + "/metrics", headers=bearer(keys["metrics"]))
            assert beside.status_code == 404
        with trusted.wrap_socket(dial(address), server_hostname="127.0.0.1") as slow:
            assert status_of(until_closed(slow)) == (408, "request_timeout")


def test_files_for_tls_are_looked_at_first(tmp_path, certificate):
    cert, key = certificate
    assert check_tls(cert, key) and not check_tls(None, None)
    for pair in ((cert, None), (None, key)):
        with pytest.raises(UsageError, match="belong together"):
            check_tls(*pair)
    other, locked = tmp_path / "other.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", other], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked], check=True,
                   capture_output=True)  # fmt: skip
    for pair in ((cert, other), (cert, locked), (key, cert), (cert, tmp_path / "none"), (cert, tmp_path)):
        with pytest.raises(UsageError, match="cannot be used for TLS"):
            check_tls(*pair)


def test_the_chat_client_has_a_key(server, keys):
    ask = [{"role": "user", "content": "a"}]
    assert "".join(stream_chat(server[0], ask, keys["use"], max_tokens=3)) == "bcd"
    with pytest.raises(RequestError, match="You didn't provide an API key"):
        list(stream_chat(server[0], ask))


def test_status_of_reads_the_last_answer():
    body = json.dumps({"error": {"code": "x"}}).encode()
    assert status_of(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 No\r\na: b\r\n\r\n" + body) == (401, "x")
