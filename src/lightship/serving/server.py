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
from typing import TYPE_CHECKING

from lightship.bundle import Bundle
from lightship.errors import EngineError, LightshipError, UnsupportedError, UsageError
from lightship.kind import Kind
from lightship.serving.auth import check_exposure, check_tls, shares_prefix_cache
from lightship.serving.fleet import Fleet, open_engine
from lightship.serving.keys import KeyFile, KeyRing
from lightship.serving.placement import listed, places
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Supervisor
from lightship.serving.tuned import check_drafted, drafted, target_of, with_tuned

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger("lightship.serving")


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
        self.places = places(settings.workers, settings.cores)
        self.settings = replace(settings, engine=replace(settings.engine, prefix_cache=shared))
        self._open = contextlib.ExitStack()
        try:
            self.bound = self._open.enter_context(bind(host, port))
            port_asked = settings.metrics_port
            self.metrics = None if port_asked is None else self._open.enter_context(bind(host, port_asked))
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

    def chosen(self, folder: Path, say: Callable[[str], None]) -> ServeSettings:
        """The settings for the bundle in `folder`, see `with_tuned`."""
        return with_tuned(folder, self.settings, say, self.places)

    def engine(self, target: str, chosen: ServeSettings | None = None) -> Supervisor | Fleet:
        """What will generate with `target`, with settings that were `chosen` for its bundle; nothing is started yet."""
        chosen = chosen or self.settings
        return open_engine(target, chosen.engine, chosen.cared, self.places)

    def server(
        self, bundle: Bundle, engine: Supervisor | Fleet | None, chosen: ServeSettings | None = None
    ) -> tuple[uvicorn.Server, FastAPI]:
        """The server of `bundle`: of a decoder with `engine`, which loads while this process imports the web
        framework. `chosen`: as of `engine`."""
        chosen = chosen or self.settings
        if engine is None and (len(self.places) > 1 or self.places[0].cores is not None):
            raise UnsupportedError("an encoder is served by one engine, in the server's own process",
                                   hint="leave --workers and --cores out")  # fmt: skip
        if engine is not None:
            engine.load(bundle.target_folder(chosen.target or bundle.targets[0]))
        import uvicorn

        from lightship.serving import admin
        from lightship.serving.app import create_shell
        from lightship.serving.deployment import Maker, kind_of
        from lightship.serving.draining import DrainingServer
        from lightship.serving.fallback import begin
        from lightship.serving.front import Front, learn
        from lightship.serving.reload import Reloader
        from lightship.serving.slot import Slot, Switch

        settings, name, slot = self.settings, self.settings.name or bundle.name, Slot()
        kind = kind_of(bundle, engine, chosen, name)
        front = Front(settings, self.keys, name, kind.model.context)
        shell = create_shell(
            slot,
            loaded=lambda: learn(slot.current.admission, slot.stats),
            around=lambda: front.open(self.metrics),
            stopping=lambda: front.door.closing,
        )
        maker = Maker(settings, self.places, name, front, shell, slot)
        reloader = Reloader(slot, maker, lambda: front.door.closing)
        maker.also = lambda app: admin.add_routes(app, reloader)
        slot.current = maker.deployment(kind)
        slot.begin = lambda: begin(slot, maker, chosen)
        shell.add_middleware(Switch, slot=slot)
        stood = front.stand_before(shell, slot, slot.snapshot, slot.engines)
        return DrainingServer(uvicorn.Config(stood, **front.listening), front.door, slot.close, settings.drain), shell


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
    path = (bundle.folder if isinstance(bundle, Bundle) else Path(bundle)).resolve()  # a link may name another later
    with Serving(settings or ServeSettings(), host, port) as serving:
        _refuse_unserved(Bundle.stated_kind(path))
        engine, chosen = None, serving.chosen(path, progress)
        if Bundle.stated_kind(path) == "decoder":
            engine = serving.engine(target_of(path, chosen), chosen)
            engine.spawn()  # imports its runtime while the bundle is verified
        try:
            opened = bundle if isinstance(bundle, Bundle) else Bundle.open(path)
            _check_draft(opened, chosen, serving.settings)
        except BaseException:
            if engine is not None:
                engine.kill()
            raise
        progress(f"{opened.name} is intact; loading")
        if chosen.engine.draft is not None and chosen.draft is not None:
            progress(f"{chosen.draft.name} is its draft and proposes {chosen.engine.draft_tokens} tokens a step")
        for number, place in enumerate(serving.places, 1):
            if place.cores is not None:
                threads = serving.settings.engine.threads or place.threads
                progress(f"engine {number}: cores {listed(place.cores)}, {threads} threads")
        server, app = serving.server(opened, engine, chosen)
        watching = threading.Thread(target=_watch, args=(server, app, serving.url, progress), daemon=True)
        watching.start()
        server.run(sockets=[serving.bound])
        watching.join(1)
        if app.state.failure is not None:
            raise app.state.failure


def _check_draft(bundle: Bundle, chosen: ServeSettings, given: ServeSettings) -> None:
    """Refuse a draft before anything is loaded, unless it can be used as `chosen` or with the defaults, to which
    `begin` falls back."""
    try:
        check_drafted(chosen, bundle)
    except LightshipError:
        if chosen.tuned is None:
            raise
        check_drafted(drafted(given), bundle)


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
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle).resolve())
    _refuse_unserved(opened.kind)
    with Serving(settings or ServeSettings(keys=None), host, port) as serving:
        chosen = serving.chosen(opened.folder, log.info)
        _check_draft(opened, chosen, serving.settings)
        engine = serving.engine(chosen.target or opened.targets[0], chosen) if opened.kind == "decoder" else None
        server, _ = serving.server(opened, engine, chosen)
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
