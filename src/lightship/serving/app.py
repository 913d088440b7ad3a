"""The HTTP API around one engine: it is started with the app and closed with it. /livez, /readyz, errors, limits; the
routes of a kind of model are added by `openai` and `encoder`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from lightship.serving import errors
from lightship.serving.draining import Door, Turnstile
from lightship.serving.limits import BodyLimit


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


def create_app(engine: Served, add_routes: Callable[[FastAPI], None], beside: Sequence[Closes] = ()) -> FastAPI:
    """The API in front of `engine`, and what runs `beside` it. `app.state.failure` is set when it cannot be loaded."""

    def failed(starting: asyncio.Task[None]) -> None:
        if not starting.cancelled():
            app.state.failure = starting.exception()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(engine.start())
        app.state.starting = starting
        starting.add_done_callback(failed)
        try:
            yield
        finally:
            starting.cancel()
            await engine.close()
            for each in beside:
                await each.close()

    app = FastAPI(title="lightship", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.failure, app.state.ready = None, lambda: engine.ready
    errors.install(app)
    app.add_middleware(BodyLimit)
    app.state.door = Door()
    app.add_middleware(Turnstile, door=app.state.door)
    _health(app, engine)
    add_routes(app)
    return app


def _health(app: FastAPI, engine: Served) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        if engine.live:
            return JSONResponse({"status": "alive"})
        return JSONResponse({"status": "stuck", "reason": engine.failure}, 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        if app.state.door.closing:
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
