"""The routes of an encoder: /predict for labels and answers, /v1/embeddings, /v1/models."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from tokenizers import Encoding

from lightship.encoder import NEVER, Encoder, Row, row_of
from lightship.engine import EncoderEngine, EngineSettings
from lightship.errors import EngineDied, RequestError
from lightship.find import find
from lightship.serving.connection import unless_gone
from lightship.serving.models import add_models, check_name
from lightship.serving.schema import AnswerRequest, ClassifyRequest, EmbeddingsRequest

JSON = dict[str, Any]
Floats = npt.NDArray[np.float32]
BATCH = 32  # rows that are run together
ANSWER = 30  # tokens of the longest answer, as in BERT's own evaluation
PLACE = {"classifier": "/predict", "qa": "/predict", "embedder": "/v1/embeddings"}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/predict")


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder of a bundle as the API sees it."""

    name: str
    digest: str
    encoder: Encoder
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of one input."""
        return self.encoder.context


class Runner:
    """The engine of an encoder in a thread of its own, which lets others work while it computes. Runs one batch after
    the other, first come, first served; a request of many inputs is many batches, so it does not block the rest."""

    failure: str | None = None  # an error is the request's own: the engine lives on

    def __init__(self, target: str, folder: Path, settings: EngineSettings) -> None:
        self.encoder = Encoder.load(folder)
        self._open: Callable[[], EncoderEngine] = lambda: find("targets", target).open_encoder(folder, settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._engine: EncoderEngine | None = None

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    async def start(self) -> None:
        """Load the model."""
        self._engine = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def run(self, rows: Sequence[Row]) -> list[Floats]:
        """What each row means (`Encoder.meaning`), padding left out; rows of like length are run together."""
        loop = asyncio.get_running_loop()
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        found: dict[int, Floats] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            found.update(zip(chosen, await loop.run_in_executor(
                self._thread, self._batch, [rows[number] for number in chosen]), strict=True))  # fmt: skip
        return [found[number] for number in range(len(rows))]

    def _batch(self, rows: list[Row]) -> list[Floats]:
        if self._engine is None:
            raise EngineDied("the model is not loaded")
        batch = self.encoder.pad_rows(rows)
        meaning = self.encoder.meaning(self._engine.run(batch.ids, batch.mask, batch.types), batch.mask)
        return [each[:, : len(row)] if self.encoder.kind == "qa" else each
                for each, row in zip(meaning, rows, strict=True)]  # fmt: skip

    async def close(self) -> None:
        """Release the model, once its batch is done."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def add_routes(app: FastAPI, runner: Runner, model: ServedEncoder) -> None:
    """The routes of an encoder."""
    add_models(app, model)
    {"classifier": _classify, "qa": _answer, "embedder": _embed}[model.encoder.kind](app, runner, model)
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


def _embed(app: FastAPI, runner: Runner, model: ServedEncoder) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> JSON:
        check_name(model, body.model)
        rows = await _rows(model, body.inputs())
        vectors = await unless_gone(request, runner.run(rows))
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


def _classify(app: FastAPI, runner: Runner, model: ServedEncoder) -> None:
    @app.post("/predict")
    async def predict(body: ClassifyRequest, request: Request) -> JSON:
        rows = [row_of(encoding) for encoding in await _encoded(model, [(text,) for text in body.inputs()])]
        found = [labels(model.encoder, meaning) for meaning in await unless_gone(request, runner.run(rows))]
        output = found[0] if isinstance(body.input, str) else found
        return {"output": output, "model": model.name, "usage": _usage(rows)}


def labels(encoder: Encoder, meaning: Floats) -> list[JSON]:
    """Labels with probabilities, the likeliest first. Where each is a yes or no of its own they do not sum to 1."""
    chances = np.exp(meaning[:, 0] if encoder.several else meaning)
    order = np.argsort(-chances, kind="stable")
    return [{"label": encoder.labels[index], "probability": float(chances[index])} for index in order]


# ── Answers ─────────────────────────────────────────────────────────────────


def _answer(app: FastAPI, runner: Runner, model: ServedEncoder) -> None:
    @app.post("/predict")
    async def predict(body: AnswerRequest, request: Request) -> JSON:
        asked = body.inputs()
        encodings = await _encoded(model, [(each.question, each.context) for each in asked])
        rows = [row_of(encoding) for encoding in encodings]
        meanings = await unless_gone(request, runner.run(rows))
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
