"""Serve a bundle on a port: verify it, bind, load the engine in its process, answer until told to stop."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightship.bundle import Bundle
from lightship.engine import EngineSettings
from lightship.errors import EngineError, UnsupportedError, UsageError
from lightship.kind import Kind
from lightship.serving.supervisor import Supervisor

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from lightship.serving.app import Served


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before any model is loaded. Port 0 takes a free one. Raises `UsageError` when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, asyncio sends small answers at once
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)  # only a listening socket keeps others from the port
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} on {host} is in use", hint="stop what runs there, or give --port") from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}", hint="check --host and --port") from error
    return bound


def _server(bundle: Bundle, engine: Supervisor, settings: EngineSettings) -> tuple[uvicorn.Server, FastAPI]:
    """The engine loads in its process while this one imports the web framework."""
    folder = bundle.target_folder(bundle.targets[0])
    engine.load(folder)
    from lightship.serving import openai
    from lightship.serving.app import create_app
    from lightship.serving.grammar import Grammars
    from lightship.serving.model import ServedModel
    from lightship.serving.scoring import Scoring

    model = ServedModel.load(bundle.name, bundle.digest, folder, settings)
    grammars, scoring = Grammars(bundle.targets[0], folder), Scoring(bundle.targets[0], folder, settings)

    def add_routes(app: FastAPI) -> None:
        openai.add_routes(app, engine, model, lambda: engine.stats.get("batching"), grammars, scoring)

    app = create_app(engine, add_routes, [grammars, scoring])
    return _listening(app, engine), app


def _encoder_server(bundle: Bundle, settings: EngineSettings) -> tuple[uvicorn.Server, FastAPI]:
    """An encoder runs in this process: it holds no lock of the interpreter while it computes."""
    from lightship.serving.app import create_app
    from lightship.serving.batcher import Batcher
    from lightship.serving.encoder import ServedEncoder, add_routes

    target = bundle.targets[0]
    batcher = Batcher(target, bundle.target_folder(target), settings)
    model = ServedEncoder(bundle.name, bundle.digest, batcher.encoder)
    app = create_app(batcher, lambda app: add_routes(app, batcher, model))
    return _listening(app, batcher), app


def _listening(app: FastAPI, engine: Served) -> uvicorn.Server:
    import uvicorn

    from lightship.serving.draining import DrainingServer

    config = uvicorn.Config(app, log_level="warning", access_log=False)
    return DrainingServer(config, app.state.door, engine.close)


def url_of(bound: socket.socket) -> str:
    """http://host:port of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    bundle: Bundle | Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: EngineSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGINT or SIGTERM; what runs then has 30 s to finish, a second signal ends it at once.

    Raises `EngineError` when the model cannot be loaded.
    """
    with bind(host, port) as bound:
        path = bundle.folder if isinstance(bundle, Bundle) else Path(bundle)
        settings = settings or EngineSettings()
        _refuse_unserved(Bundle.stated_kind(path))
        if Bundle.stated_kind(path) == "decoder":
            engine = Supervisor(Bundle.stated_target(path), settings)
            engine.spawn()  # imports its runtime while the bundle is verified
            try:
                opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
            except BaseException:
                engine.kill()
                raise
            progress(f"{opened.name} is intact; loading")
            server, app = _server(opened, engine, settings)
        else:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
            progress(f"{opened.name} is intact; loading")
            server, app = _encoder_server(opened, settings)
        watching = threading.Thread(target=_watch, args=(server, app, url_of(bound), progress), daemon=True)
        watching.start()
        server.run(sockets=[bound])
        watching.join(1)
        if app.state.failure is not None:
            raise app.state.failure


def _refuse_unserved(kind: Kind) -> None:
    if kind == "seq2seq":
        raise UnsupportedError(
            "encoder-decoders, such as translators, are not served yet: the API has no task for them",
            hint="measure it with `lightship check` and `lightship evaluate`, or open it in Python: "
            "lightship.targets.<target>.open(bundle.target_folder(target)) writes for token ids",
        )


def _watch(server: uvicorn.Server, app: FastAPI, url: str, progress: Callable[[str], None]) -> None:
    """Say when the engine is ready; end the server when it cannot be loaded."""
    while not server.should_exit:
        if app.state.failure is not None:
            server.should_exit = True
        elif app.state.ready():
            progress(f"serving on {url} (Ctrl-C stops)")
            return
        time.sleep(0.05)


@contextlib.contextmanager
def running(
    bundle: Bundle | Path | str, host: str = "127.0.0.1", port: int = 0, settings: EngineSettings | None = None
) -> Iterator[str]:
    """A server in a thread, for tests and the demo: yields its URL when it is ready, stops it afterwards."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _refuse_unserved(opened.kind)
    with bind(host, port) as bound:
        settings = settings or EngineSettings()
        if opened.kind == "decoder":
            server, _ = _server(opened, Supervisor(opened.targets[0], settings), settings)
        else:
            server, _ = _encoder_server(opened, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            wait_ready(url_of(bound), alive=thread.is_alive)
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join(40)


def wait_ready(url: str, timeout: float = 300, alive: Callable[[], bool] = lambda: True) -> None:
    """Poll /readyz until it answers 200. Raises `EngineError` with the server's reason when loading failed."""
    import httpx

    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not alive():
            raise EngineError(f"the server at {url} ended while starting")
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)  # no proxy between
            if answer.status_code == 200:
                return
            if answer.json()["status"] in ("failed", "stopped"):
                raise EngineError(f"the server could not load the model: {answer.json()['reason']}")
        time.sleep(0.05)
    raise EngineError(f"the server at {url} was not ready after {timeout:.0f} s")
