"""/admin: change the bundle that is served, go back to the one before, and see which they are."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from lightship.serving.reception import whose
from lightship.serving.reload import Reloader

log = logging.getLogger("lightship.serving")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ReloadRequest(_Body):
    """`bundle`: the absolute path of a bundle on the server's machine."""

    bundle: Annotated[str, Field(min_length=1, max_length=4096)]


class RollbackRequest(_Body):
    """`{}`. A body must be there: a web page can send a request without one wherever it likes, but none of JSON."""


def add_routes(app: FastAPI, reloader: Reloader) -> None:
    """The routes. A change that was begun goes on when its client leaves: see `last` of the deployments."""

    @app.post("/admin/reload")
    async def reload(body: ReloadRequest, request: Request) -> dict[str, Any]:
        log.warning("asked to serve %s, by key %r", body.bundle, whose(request))
        return await reloader.reload(body.bundle)

    @app.post("/admin/rollback")
    async def rollback(body: RollbackRequest, request: Request) -> dict[str, Any]:
        log.warning("asked to go back to the bundle before, by key %r", whose(request))
        return await reloader.rollback()

    @app.get("/admin/deployments")
    async def deployments() -> dict[str, Any]:
        return reloader.described()
