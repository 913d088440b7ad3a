"""/v1/chat/completions and /v1/completions as OpenAI's API has them, and /predict."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lightship.engine import GenerationParams
from lightship.errors import LightshipError, RequestError
from lightship.serving import errors
from lightship.serving.connection import Stream, unless_gone
from lightship.serving.generation import Answer
from lightship.serving.model import ServedModel
from lightship.serving.models import add_models, check_name
from lightship.serving.schema import ChatRequest, CompletionRequest, PredictRequest, Sampling
from lightship.serving.supervisor import Supervisor

log = logging.getLogger("lightship.serving")
JSON = dict[str, Any]


def add_routes(app: FastAPI, engine: Supervisor, model: ServedModel) -> None:
    """The routes of a model that generates."""
    add_models(app, model, lambda: engine.stats.get("batching"))

    def check(body: Sampling) -> None:
        check_name(model, body.model)
        body.refuse_unsupported()

    def answer(body: Sampling, tokens: list[int], wanted: int | None, param: str) -> Answer:
        return Answer(engine, model, tokens, body.params(model.room(tokens, wanted, param)), body.stops())

    # Tokenizing takes seconds for megabytes; in a thread it does not hold the other streams up.
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check(body)
        tokens = await asyncio.to_thread(model.chat_tokens, [message.plain() for message in body.messages])
        shape = Chat("chatcmpl-" + secrets.token_hex(12), model.name)
        return await _reply(answer(body, tokens, body.limit(), "messages"), body, shape, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check(body)
        tokens = await asyncio.to_thread(model.prompt_tokens, body.single())
        shape = Completion("cmpl-" + secrets.token_hex(12), model.name)
        return await _reply(answer(body, tokens, body.limit(), "prompt"), body, shape, request)

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        message = f"{model.name!r} generates text, it gives no embeddings; it is served on /v1/chat/completions"
        raise RequestError(message, None, "wrong_kind_of_model", 404)

    @app.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> JSON:
        tokens = await asyncio.to_thread(model.question_tokens, body.input)
        limit = model.room(tokens, body.max_tokens, "input")
        found = Answer(engine, model, tokens, GenerationParams(limit, body.temperature, seed=body.seed), [])
        text = await _collect(found, request)
        return {"output": text, "model": model.name, "finish_reason": found.finish, "usage": found.usage()}


@dataclass(frozen=True)
class Chat:
    """The JSON shapes of a chat completion."""

    id: str
    model: str

    def whole(self, text: str, answer: Answer) -> JSON:
        """The response in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
        return {"id": self.id, "object": "chat.completion", "created": answer.started, "model": self.model,
                "choices": [choice], "usage": answer.usage()}  # fmt: skip

    def opening(self) -> JSON | None:
        """The first delta."""
        return {"role": "assistant", "content": ""}

    def chunk(self, delta: JSON | str | None, finish: str | None, answer: Answer) -> JSON:
        """One streamed chunk; `delta` None is the last of a choice."""
        content = delta if isinstance(delta, dict) else {} if delta is None else {"content": delta}
        choice = {"index": 0, "delta": content, "logprobs": None, "finish_reason": finish}
        return {"id": self.id, "object": "chat.completion.chunk", "created": answer.started, "model": self.model,
                "choices": [choice]}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """The JSON shapes of a text completion."""

    id: str
    model: str

    def whole(self, text: str, answer: Answer) -> JSON:
        """The response in one piece."""
        return {**self.chunk(text, answer.finish, answer), "usage": answer.usage()}

    def opening(self) -> JSON | None:
        """There is none."""
        return None

    def chunk(self, delta: JSON | str | None, finish: str | None, answer: Answer) -> JSON:
        """One streamed chunk, which has the shape of the whole."""
        choice = {"index": 0, "text": delta or "", "logprobs": None, "finish_reason": finish}
        return {"id": self.id, "object": "text_completion", "created": answer.started, "model": self.model,
                "choices": [choice]}  # fmt: skip


async def _reply(answer: Answer, body: Sampling, shape: Chat | Completion, request: Request) -> Response:
    if not body.stream:
        return JSONResponse(shape.whole(await _collect(answer, request), answer))
    pieces = answer.pieces()
    # Errors up to the first piece still get their own status.
    first = await unless_gone(request, anext(pieces, ""))
    usage = body.stream_options is not None and body.stream_options.include_usage
    stream = _stream(answer, first, pieces, shape, usage)
    return Stream(stream)


async def _stream(
    answer: Answer, first: str, pieces: AsyncGenerator[str, None], shape: Chat | Completion, usage: bool
) -> AsyncGenerator[str, None]:
    def send(chunk: JSON) -> str:
        if usage and "usage" not in chunk:
            chunk = {**chunk, "usage": None}
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"

    try:
        if (opening := shape.opening()) is not None:
            yield send(shape.chunk(opening, None, answer))
        if first:
            yield send(shape.chunk(first, None, answer))
        async for piece in pieces:
            if piece:
                yield send(shape.chunk(piece, None, answer))
        yield send(shape.chunk(None, answer.finish, answer))
        if usage:
            yield send({**shape.chunk(None, None, answer), "choices": [], "usage": answer.usage()})
    except LightshipError as error:
        yield f"data: {json.dumps(errors.from_error(error)[1])}\n\n"
    except Exception:
        log.exception("unexpected error in a stream")
        yield f"data: {json.dumps(errors.envelope('internal error', 500))}\n\n"
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


async def _collect(answer: Answer, request: Request) -> str:
    """The whole text."""

    async def everything() -> str:
        return "".join([piece async for piece in answer.pieces()])

    return await unless_gone(request, everything())
