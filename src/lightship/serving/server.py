"""Serve a bundle on a port: verify it, bind, load the engine in its process, answer until told to stop."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.bundle import Bundle
from lightship.errors import EngineError, UnsupportedError, UsageError
from lightship.kind import Kind
from lightship.serving.auth import check_exposure, check_tls, shares_prefix_cache
from lightship.serving.keys import KeyFile, KeyRing
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Limits
from lightship.serving.tuned import facts, target_of, with_tuned

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from lightship.serving.app import Served
    from lightship.serving.front import Front

log = logging.getLogger("lightship.serving")
UNKNOWN = 10**9  # blocks of a KV cache whose engine does not tell its size


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


class Serving:
    """A bundle being made ready to be served: checked and bound first, then loaded while it is verified."""

    def __init__(self, settings: ServeSettings, host: str, port: int) -> None:
        """Raises `UsageError` for what must not be exposed, a key file that cannot be used, or a taken port."""
        self.keys = KeyRing(KeyFile(settings.keys) if settings.keys is not None else None)
        self.tls = check_tls(settings.tls_cert, settings.tls_key)
        check_exposure(host, self.keys, self.tls, settings.behind_proxy)
        shared = settings.engine.prefix_cache and shares_prefix_cache(self.keys, settings.share_prefix_cache)
        self.settings = replace(settings, engine=replace(settings.engine, prefix_cache=shared))
        self._open = contextlib.ExitStack()
        try:
            self.bound = self._open.enter_context(bind(host, port))
            asked = settings.metrics_port
            self.metrics = None if asked is None else self._open.enter_context(bind(host, asked))
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def url(self) -> str:
        """Where it is served."""
        return url_of(self.bound, self.tls)

    def server(self, bundle: Bundle, engine: Supervisor | None) -> tuple[uvicorn.Server, FastAPI]:
        """The server of `bundle`: of a decoder with `engine`, which loads while this process imports the web
        framework."""
        return self._decoder(bundle, engine) if engine is not None else self._encoder(bundle)

    def _decoder(self, bundle: Bundle, engine: Supervisor) -> tuple[uvicorn.Server, FastAPI]:
        target = self.settings.target or bundle.targets[0]
        folder = bundle.target_folder(target)
        engine.load(folder)
        from lightship.serving import openai
        from lightship.serving.front import Front
        from lightship.serving.grammar import Grammars
        from lightship.serving.model import ServedModel
        from lightship.serving.scoring import Scoring

        settings = self.settings
        model = ServedModel.load(bundle.name, bundle.digest, folder, settings.engine)
        context = min(model.context, settings.max_context or model.context)
        model = replace(model, context=context, facts=facts(bundle, settings))
        grammars = Grammars(target, folder)
        scoring = Scoring(target, folder, settings.engine) if settings.scoring else None
        capacity = Limits(blocks=UNKNOWN, max_concurrent=settings.max_concurrent)
        front = Front(settings, self.keys, model.name, model.context, capacity, bundle.report)

        def add_routes(app: FastAPI) -> None:
            openai.add_routes(
                app, engine, model, lambda: engine.stats.get("batching"), grammars, scoring, front.admission
            )

        return self._listening(engine, add_routes, front, [grammars, *([scoring] if scoring else [])])

    def _encoder(self, bundle: Bundle) -> tuple[uvicorn.Server, FastAPI]:
        """An encoder runs in this process: it holds no lock of the interpreter while it computes."""
        from lightship.serving.batcher import Batcher
        from lightship.serving.encoder import ServedEncoder, add_routes, capacity
        from lightship.serving.front import Front

        target, settings = bundle.targets[0], self.settings
        batcher = Batcher(target, bundle.target_folder(target), settings.engine)
        model = ServedEncoder(bundle.name, bundle.digest, batcher.encoder, facts(bundle, settings))
        front = Front(settings, self.keys, model.name, model.context, capacity(model.context), bundle.report)
        return self._listening(batcher, lambda app: add_routes(app, batcher, model, front.admission), front)

    def _listening(
        self, engine: Served, add_routes: Callable[[FastAPI], None], front: Front, beside: Any = ()
    ) -> tuple[uvicorn.Server, FastAPI]:
        import uvicorn

        from lightship.serving.app import create_app
        from lightship.serving.draining import DrainingServer

        app = create_app(
            engine,
            add_routes,
            beside,
            loaded=lambda: front.loaded(engine.stats),
            around=lambda: front.open(self.metrics),
            stopping=lambda: front.door.closing,
        )
        config = uvicorn.Config(front.stand_before(app, engine), **front.listening)
        return DrainingServer(config, front.door, engine.close, self.settings.drain), app


def url_of(bound: socket.socket, tls: bool = False) -> str:
    """http://host:port of a bound socket."""
    host, port = bound.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(
    bundle: Bundle | Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGINT or SIGTERM; what runs then has 30 s to finish, a second signal ends it at once.

    Raises `UsageError` for an address that others can reach without a key or TLS, `EngineError` when the model cannot
    be loaded.
    """
    path = bundle.folder if isinstance(bundle, Bundle) else Path(bundle)
    with Serving(with_tuned(path, settings or ServeSettings(), progress), host, port) as serving:
        _refuse_unserved(Bundle.stated_kind(path))
        engine = None
        if Bundle.stated_kind(path) == "decoder":
            engine = Supervisor(target_of(path, serving.settings), serving.settings.engine, serving.settings.care)
            engine.spawn()  # imports its runtime while the bundle is verified
        try:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        except BaseException:
            if engine is not None:
                engine.kill()
            raise
        progress(f"{opened.name} is intact; loading")
        server, app = serving.server(opened, engine)
        watching = threading.Thread(target=_watch, args=(server, app, serving.url, progress), daemon=True)
        watching.start()
        server.run(sockets=[serving.bound])
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
    bundle: Bundle | Path | str, host: str = "127.0.0.1", port: int = 0, settings: ServeSettings | None = None
) -> Iterator[str]:
    """A server in a thread, for tests and the demo: yields its URL when it is ready, stops it afterwards. Without
    `settings` it asks for no keys."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _refuse_unserved(opened.kind)
    settings = with_tuned(opened.folder, settings or ServeSettings(keys=None), log.info)
    with Serving(settings, host, port) as serving:
        chosen = serving.settings
        engine = (
            Supervisor(chosen.target or opened.targets[0], chosen.engine, chosen.care)
            if opened.kind == "decoder"
            else None
        )
        server, _ = serving.server(opened, engine)
        with in_thread(server, serving.bound, serving.url):
            yield serving.url


@contextlib.contextmanager
def in_thread(server: uvicorn.Server, bound: socket.socket, url: str) -> Iterator[threading.Thread]:
    """`server` on `bound` in a thread, ready; stopped afterwards."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        wait_ready(url, alive=thread.is_alive)
        yield thread
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
