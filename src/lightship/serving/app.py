"""The HTTP API around one engine: it is started with the app and closed with it. /livez, /readyz, errors, limits; the
routes of a kind of model are added by `openai` and `encoder`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from lightship.serving import errors
from lightship.serving.limits import BodyLimit


class Served(Protocol):
    """What the app needs to know of an engine."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
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
    _health(app, engine)
    add_routes(app)
    return app


def _health(app: FastAPI, engine: Served) -> None:
    @app.get("/livez")
    async def livez() -> dict[str, Any]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        if engine.ready:
            return JSONResponse({"status": "ready"})
        starting: asyncio.Task[None] = app.state.starting
        failed = starting.exception() if starting.done() and not starting.cancelled() else None
        state = "failed" if failed else "stopped" if starting.done() else "loading"
        return JSONResponse({"status": state, "reason": str(failed) if failed else engine.failure}, 503)
