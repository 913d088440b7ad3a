"""The HTTP API around one engine, which is started with the app and closed with it: /livez, /readyz, /health, errors.

The routes of a kind of model are added by `openai` and `encoder`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from lightship.serving import errors


class Served(Protocol):
    """What the app needs to know of an engine."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        ...

    @property
    def live(self) -> bool:
        """Whether it works, loads or will be started again; False: only a new process helps."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it died, when it could still say so."""
        ...

    @property
    def stats(self) -> Mapping[str, Any]:
        """See `Engine.stats`."""
        ...

    @property
    def restarts(self) -> int:
        """How often it was replaced."""
        ...

    def resident(self) -> int | None:
        """Bytes of memory of its process; None where it has none of its own, or none now."""
        ...

    async def start(self) -> None:
        """Load the model."""
        ...

    async def close(self) -> None:
        """Release it."""
        ...


class Closes(Protocol):
    """What is closed after the engine: processes that the routes started."""

    async def close(self) -> None:
        """End it."""
        ...


def create_app(
    engine: Served,
    add_routes: Callable[[FastAPI], None],
    beside: Sequence[Closes] = (),
    loaded: Callable[[], None] = lambda: None,
    around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The API in front of `engine`, and what runs `beside` it, in one app; nothing guards it yet, see `front`. The
    parameters are those of `create_shell`."""
    app = create_shell(engine, loaded, around, stopping, beside)
    _health(app, engine)
    add_routes(app)
    return app


def create_routes(shell: FastAPI, engine: Served, add_routes: Callable[[FastAPI], None]) -> FastAPI:
    """An app of routes that lives in `shell`, one of several perhaps."""
    app = FastAPI(title="lightship", docs_url=None, redoc_url=None)
    app.state = shell.state
    errors.install(app)
    _health(app, engine)
    add_routes(app)
    return app


def create_shell(
    engine: Served,
    loaded: Callable[[], None] = lambda: None,
    around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    stopping: Callable[[], bool] = lambda: False,
    beside: Sequence[Closes] = (),
) -> FastAPI:
    """An app without routes that starts `engine` and closes it, and then what runs `beside` it.

    `loaded` is called once the engine is ready, `around` is open as long as the app runs, `stopping` tells that it will
    soon end. `app.state.failure` is set when the engine cannot be loaded.
    """

    async def start() -> None:
        await engine.start()
        loaded()

    def failed(starting: asyncio.Task[None]) -> None:
        if not starting.cancelled():
            app.state.failure = starting.exception()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(start())
        app.state.starting = starting
        starting.add_done_callback(failed)
        async with around():
            try:
                yield
            finally:
                starting.cancel()
                await engine.close()
                for each in beside:
                    await each.close()

    app = FastAPI(title="lightship", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.failure, app.state.ready, app.state.stopping = None, lambda: engine.ready, stopping
    errors.install(app)
    return app


def _health(app: FastAPI, engine: Served) -> None:
    @app.head("/livez", include_in_schema=False)
    @app.get("/livez")
    async def livez() -> Response:
        if engine.live:
            return JSONResponse({"status": "alive"})
        return JSONResponse({"status": "stuck", "reason": engine.failure}, 503)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")  # what clients of vLLM and llama.cpp probe
    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz")
    async def readyz() -> Response:
        if app.state.stopping():
            return JSONResponse({"status": "stopping", "reason": None}, 503)
        if engine.ready:
            return JSONResponse({"status": "ready"})
        failed = app.state.failure
        return JSONResponse({"status": _state(app, engine), "reason": str(failed) if failed else engine.failure}, 503)


def _state(app: FastAPI, engine: Served) -> str:
    """Of an engine that is not ready."""
    if app.state.failure is not None:
        return "failed"
    if not app.state.starting.done():
        return "loading"
    return "restarting" if engine.live else "stopped"
