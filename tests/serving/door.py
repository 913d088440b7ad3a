"""A server with its doors, the FakeEngine behind, for tests of keys and limits; and sockets that misbehave."""

import contextlib
import json
import socket
import threading
import time

import httpx
import uvicorn

from lightship.engine import EngineSettings
from lightship.report import Report
from lightship.serving import openai as routes
from lightship.serving.app import create_app
from lightship.serving.draining import DrainingServer
from lightship.serving.front import Front
from lightship.serving.keys import KeyRing
from lightship.serving.limits import Limits
from lightship.serving.model import ServedModel
from lightship.serving.server import bind, url_of, wait_ready
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Limits as Capacity
from tests.serving.test_protocol import byte_tokenizer


def model_folder(folder, context=4_000_000):
    """Bytes for tokens, and no end: an answer is as long as it may be."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256, "max_position_embeddings": context}))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@contextlib.contextmanager
def served(folder, ring=None, limits=None, local=False, tls=(None, None), metrics=None):
    """The URL of a running server, and its app. `metrics` is the socket for /metrics, when it has one of its own."""
    settings = ServeSettings(limits=limits or Limits(), behind_proxy=not local, tls_cert=tls[0], tls_key=tls[1],
                             metrics_port=None if metrics is None else 0)  # fmt: skip
    engine = Supervisor("fake", EngineSettings())
    engine.load(folder)
    model = ServedModel.load("org/fake", "0" * 64, folder)
    capacity = Capacity(blocks=10**9, max_concurrent=64)
    front = Front(settings, ring or KeyRing(None), model.name, model.context)
    admission = front.admission(capacity, Report(()))
    admission.begin(admission.limits)  # the engine tells no more
    app = create_app(engine, lambda app: routes.add_routes(app, engine, model, admission=admission),
                     around=lambda: front.open(metrics))  # fmt: skip
    front.furnish(app)
    with bind("127.0.0.1", 0) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client which does not read is noticed
        config = uvicorn.Config(
            front.stand_before(app, engine, admission.snapshot), **{**front.listening, "log_level": "critical"}
        )
        server = DrainingServer(config, front.door, engine.close, 2)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            if tls[0]:
                wait_for(lambda: server.started and app.state.ready())
            else:
                wait_ready(url_of(bound), 30, thread.is_alive)
            yield url_of(bound), app
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive() and not engine.alive


def wait_for(condition, seconds=30.0):
    """Until `condition` holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def healthy(url, **headers):
    """A request that must be answered whatever else goes on."""
    body = {"prompt": "a", "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=5)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "bc"


def dial(url, timeout=10.0):
    """A socket to the server."""
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout)


def post(body=b"", path="/v1/completions", length=None, **headers):
    """The bytes of a request; `length` is what is announced."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def until_closed(connection):
    """All that comes until the server closes; a reset counts as one. Raises `TimeoutError` when it does not close."""
    found = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while piece := connection.recv(65536):
            found += piece
    return found


def status_of(answer):
    """Status and error code of the last response in raw bytes."""
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]
