"""The HTTP API: /v1/chat/completions, /v1/completions, /v1/models, /predict, /livez, /readyz."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightship.engine import GenerationParams
from lightship.errors import EngineError, LightshipError, RequestError
from lightship.serving import errors
from lightship.serving.model import ServedModel
from lightship.serving.schema import ChatRequest, CompletionRequest, PredictRequest, Sampling
from lightship.serving.text import TextStream
from lightship.serving.worker import Worker

log = logging.getLogger("lightship.serving")
JSON = dict[str, Any]
Result = TypeVar("Result")
BODY_LIMIT = 8 * 2**20  # bytes of a request


@dataclass
class Answer:
    """One generation on its way: pieces of text, then how it ended and what it used."""

    worker: Worker
    model: ServedModel
    tokens: list[int]
    params: GenerationParams
    stops: list[str]
    finish: str = "stop"
    produced: int = 0
    started: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Text as it becomes certain. Closing this early cancels the request in the engine."""
        text = TextStream(self.model.tokenizer, self.stops)
        events = self.worker.generate(self.tokens, self.params)
        try:
            async for event in events:
                self.produced += len(event.token_ids)
                yield text.push(event.token_ids)
                if text.stopped:
                    return
                self.finish = event.finish_reason or self.finish
            if rest := text.finish():
                yield rest
            if text.stopped:
                self.finish = "stop"
        finally:
            await events.aclose()

    def usage(self) -> JSON:
        """Token counts; the end-of-text token is not counted."""
        return {
            "prompt_tokens": len(self.tokens),
            "completion_tokens": self.produced,
            "total_tokens": len(self.tokens) + self.produced,
        }


def create_app(worker: Worker, model: ServedModel) -> FastAPI:
    """The API in front of `worker`, which is started with the app and closed with it."""

    def failed(starting: asyncio.Task[None]) -> None:
        if not starting.cancelled():
            app.state.failure = starting.exception()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(worker.start())
        app.state.starting = starting
        starting.add_done_callback(failed)
        try:
            yield
        finally:
            starting.cancel()
            await worker.close()

    app = FastAPI(title="lightship", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.failure, app.state.ready = None, lambda: worker.ready
    errors.install(app)
    app.add_middleware(BodyLimit)
    _health(app, worker)
    add_models(app, model, lambda: worker.stats.get("batching"))
    _completions(app, worker, model)
    return app


def _health(app: FastAPI, worker: Worker) -> None:
    @app.get("/livez")
    async def livez() -> JSON:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        if worker.ready:
            return JSONResponse({"status": "ready"})
        starting: asyncio.Task[None] = app.state.starting
        failed = starting.exception() if starting.done() and not starting.cancelled() else None
        state = "failed" if failed else "stopped" if starting.done() else "loading"
        return JSONResponse({"status": state, "reason": str(failed) if failed else worker.failure}, 503)


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


def add_models(app: FastAPI, model: Card, batching: Callable[[], str | None] | None = None) -> None:
    """/v1/models: the one that is served. `batching` tells what the engine says of itself, null until it is loaded:
    `none` computes one request at a time."""

    def card() -> JSON:
        found = {"id": model.name, "object": "model", "created": model.created, "owned_by": "lightship",
                 "context_length": model.context, "digest": model.digest}  # fmt: skip
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


def _completions(app: FastAPI, worker: Worker, model: ServedModel) -> None:
    def check(body: Sampling) -> None:
        check_name(model, body.model)
        body.refuse_unsupported()

    def answer(body: Sampling, tokens: list[int], wanted: int | None, param: str) -> Answer:
        return Answer(worker, model, tokens, body.params(model.room(tokens, wanted, param)), body.stops())

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
        found = Answer(worker, model, tokens, GenerationParams(limit, body.temperature, seed=body.seed), [])
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


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled, and with it the request in the engine, when the client goes away."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def wrapped() -> Result:
        return await work

    working, gone = asyncio.create_task(wrapped()), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise EngineError("the client closed the connection")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class Stream(StreamingResponse):
    """Closes its source however it ends, so that a client which leaves between two chunks frees the engine at once."""

    def __init__(self, source: AsyncGenerator[str, None]) -> None:
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


class BodyLimit:
    """ASGI middleware: 413 for a body beyond `BODY_LIMIT`, declared or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what arrives."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_LIMIT:
                if message.get("more_body"):
                    await self._drain(receive)
                raise HTTPException(413, f"the body exceeds {BODY_LIMIT} bytes")
            return message

        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_LIMIT:
            await self._drain(receive)
            body = errors.envelope(f"the body exceeds {BODY_LIMIT} bytes", 413)
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, counted, send)

    @staticmethod
    async def _drain(receive: Receive) -> None:
        """Read what is still coming, within bounds: a connection closed with unread data is reset, and the client may
        lose the answer."""
        seen = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while seen < 4 * BODY_LIMIT:
                    message = await receive()
                    seen += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
