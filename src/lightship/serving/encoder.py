"""The routes of an encoder: /predict for labels and answers, /v1/embeddings, /v1/models."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from tokenizers import Encoding

from lightship.encoder import NEVER, Encoder, Row, row_of
from lightship.errors import RequestError
from lightship.serving.admission import Admission
from lightship.serving.batcher import Batcher
from lightship.serving.connection import unless_gone
from lightship.serving.models import add_models, check_name
from lightship.serving.reception import enter
from lightship.serving.schema import MANY, AnswerRequest, ClassifyRequest, EmbeddingsRequest
from lightship.serving.ticket import Limits

JSON = dict[str, Any]
Floats = npt.NDArray[np.float32]
Run = Callable[[Request, Sequence[Row]], Awaitable[list[Floats]]]  # what each row means, in turn with other requests
ANSWER = 30  # tokens of the longest answer, as in BERT's own evaluation
PLACE = {"classifier": "/predict", "qa": "/predict", "embedder": "/v1/embeddings"}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/predict")


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder of a bundle as the API sees it."""

    name: str
    digest: str
    encoder: Encoder
    facts: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of one input."""
        return self.encoder.context


def capacity(context: int) -> Limits:
    """What may be in the queue and the engine together: twice the largest request there is."""
    blocks = 2 * MANY * math.ceil(context / Limits.block_tokens)
    return Limits(blocks=blocks, max_concurrent=2 * MANY)


def add_routes(app: FastAPI, batcher: Batcher, model: ServedEncoder, admission: Admission | None = None) -> None:
    """The routes of an encoder. `admission` bounds what waits and runs."""
    add_models(app, model)
    gate = admission or Admission(capacity(model.context))

    async def run(request: Request, rows: Sequence[Row]) -> list[Floats]:
        async with await enter(gate, request, [len(row) for row in rows], [0] * len(rows)) as ticket, ticket.in_time():
            found = await unless_gone(request, batcher.run(rows))
            ticket.first_token()
            ticket.finish = "stop"
        return found

    {"classifier": _classify, "qa": _answer, "embedder": _embed}[model.encoder.kind](app, run, model)
    _elsewhere(app, model)


def _elsewhere(app: FastAPI, model: ServedEncoder) -> None:
    """Say on the routes of other kinds of models what this one is for."""
    place = PLACE[model.encoder.kind]
    for route in ROUTES:
        if route != place:

            @app.post(route)
            async def other() -> None:
                raise RequestError(f"{model.name!r} is no model for this route: it is served on {place} "
                                   f"({model.encoder.kind})", None, "wrong_kind_of_model", 404)  # fmt: skip


def _usage(rows: Sequence[Row]) -> JSON:
    count = sum(map(len, rows))
    return {"prompt_tokens": count, "total_tokens": count}


async def _encoded(model: ServedEncoder, texts: Sequence[tuple[str, ...]]) -> list[Encoding]:
    """Tokenised in a thread, since megabytes of text take seconds."""

    def all_of_them() -> list[Encoding]:
        return [model.encoder.encode(*text) for text in texts]

    return await asyncio.to_thread(all_of_them)


# ── Embeddings ──────────────────────────────────────────────────────────────


def _embed(app: FastAPI, run: Run, model: ServedEncoder) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> JSON:
        check_name(model, body.model)
        rows = await _rows(model, body.inputs())
        vectors = await run(request, rows)
        if body.dimensions not in (None, len(vectors[0])):
            raise RequestError(f"this model has {len(vectors[0])} dimensions and no others", "dimensions")
        data = [{"object": "embedding", "index": index, "embedding": _shown(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)]  # fmt: skip
        return {"object": "list", "data": data, "model": model.name, "usage": _usage(rows)}


async def _rows(model: ServedEncoder, inputs: Sequence[str | list[int]]) -> list[Row]:
    """Token ids are taken as they are, special tokens not added."""
    if not isinstance(inputs[0], str):
        for ids in inputs:
            model.encoder.check(ids, "input")  # type: ignore[arg-type]
        return [Row(tuple(ids), (0,) * len(ids)) for ids in inputs]  # type: ignore[arg-type]
    return [row_of(encoding) for encoding in await _encoded(model, [(str(text),) for text in inputs])]


def _shown(vector: Floats, form: str) -> str | list[float]:
    """Base64 of little-endian float32, as the OpenAI clients ask for it, or numbers."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


# ── Labels ──────────────────────────────────────────────────────────────────


def _classify(app: FastAPI, run: Run, model: ServedEncoder) -> None:
    @app.post("/predict")
    async def predict(body: ClassifyRequest, request: Request) -> JSON:
        rows = [row_of(encoding) for encoding in await _encoded(model, [(text,) for text in body.inputs()])]
        found = [labels(model.encoder, meaning) for meaning in await run(request, rows)]
        output = found[0] if isinstance(body.input, str) else found
        return {"output": output, "model": model.name, "usage": _usage(rows)}


def labels(encoder: Encoder, meaning: Floats) -> list[JSON]:
    """Labels with probabilities, the likeliest first. Where each is a yes or no of its own they do not sum to 1."""
    chances = np.exp(meaning[:, 0] if encoder.several else meaning)
    order = np.argsort(-chances, kind="stable")
    return [{"label": encoder.labels[index], "probability": float(chances[index])} for index in order]


# ── Answers ─────────────────────────────────────────────────────────────────


def _answer(app: FastAPI, run: Run, model: ServedEncoder) -> None:
    @app.post("/predict")
    async def predict(body: AnswerRequest, request: Request) -> JSON:
        asked = body.inputs()
        encodings = await _encoded(model, [(each.question, each.context) for each in asked])
        rows = [row_of(encoding) for encoding in encodings]
        meanings = await run(request, rows)
        found = [best_span(encoding, meaning, each.context)
                 for encoding, meaning, each in zip(encodings, meanings, asked, strict=True)]  # fmt: skip
        output = found if isinstance(body.input, list) else found[0]
        return {"output": output, "model": model.name, "usage": _usage(rows)}


def best_span(encoding: Encoding, meaning: Floats, context: str) -> JSON:
    """The likeliest answer inside `context`: its text, where it starts and ends (characters), and its probability among
    all spans of the context. `meaning`: log-probabilities of start and end, (2, tokens)."""
    inside = np.array([part == 1 for part in encoding.sequence_ids])
    if not inside.any():
        raise RequestError("the context has no tokens", "input.context")
    start, end = (np.where(inside, row, NEVER).astype(np.float64) for row in meaning)
    start, end = (row - np.logaddexp.reduce(row) for row in (start, end))
    best = (-np.inf, 0, 0)
    for longer in range(min(ANSWER, len(start))):
        together = start[: len(start) - longer] + end[longer:]
        first = int(together.argmax())
        best = max(best, (float(together[first]), first, first + longer))
    score, first, last = best
    begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
    return {"answer": context[begin:stop], "start": begin, "end": stop, "score": float(np.exp(score))}
