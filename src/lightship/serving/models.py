"""/v1/models: the one model that is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fastapi import FastAPI

from lightship.errors import RequestError

JSON = dict[str, Any]


class Card(Protocol):
    """What /v1/models says of a model."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def created(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


def add_models(app: FastAPI, model: Card, batching: Callable[[], str | None] | None = None) -> None:
    """/v1/models: the one that is served. `batching` tells what the engine says of itself, null until it is loaded:
    `none` computes one request at a time."""

    def card() -> JSON:
        found = {"id": model.name, "object": "model", "created": model.created, "owned_by": "lightship",
                 "context_length": model.context, "digest": model.digest, **model.facts}  # fmt: skip
        return found if batching is None else {**found, "batching": batching()}

    @app.get("/v1/models")
    async def models() -> JSON:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> JSON:
        check_name(model, name)
        return card()


def check_name(model: Card, name: str | None) -> None:
    """Raise `RequestError` (404) for another model than the one that is served."""
    if name is not None and name != model.name:
        raise RequestError(f"this server has the model {model.name!r} only", "model", "model_not_found", 404)
