"""/v1/chat/completions and /v1/completions as OpenAI's API has them, and /predict."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lightship.engine import GenerationParams, Grammar
from lightship.errors import LightshipError, RequestError
from lightship.serving import errors
from lightship.serving.admission import Admission
from lightship.serving.connection import COMMENT, KEEP_ALIVE, Stream, begun, unless_gone
from lightship.serving.generation import Generates, Generation, Piece
from lightship.serving.grammar import Grammars
from lightship.serving.model import ServedModel
from lightship.serving.models import add_models, check_name
from lightship.serving.prefix import Prefix
from lightship.serving.reception import enter, whose
from lightship.serving.schema import ChatRequest, CompletionRequest, PredictRequest, Sampling, StreamOptions
from lightship.serving.scoring import Scoring, echoed
from lightship.serving.shapes import Chat, Completion
from lightship.serving.ticket import Limits, Ticket

log = logging.getLogger("lightship.serving")
JSON = dict[str, Any]
UNBOUNDED = 10**9
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
MARK = "\0"  # in no name, and in JSON only as an escape


def add_routes(
    app: FastAPI,
    engine: Generates,
    model: ServedModel,
    batching: Callable[[], str | None] = lambda: None,
    grammars: Grammars | None = None,
    scoring: Scoring | None = None,
    admission: Admission | None = None,
    keep_alive: float = KEEP_ALIVE,
) -> None:
    """The routes of a model that generates. `batching` tells what the engine says of itself once it is loaded;
    `grammars` checks what an answer is to be held to, `scoring` scores what is echoed: without them that is refused.
    `admission` bounds what runs."""
    add_models(app, model, batching)
    gate = admission or Admission(Limits(blocks=UNBOUNDED, max_concurrent=UNBOUNDED))

    def check(body: Sampling) -> None:
        check_name(model, body.model)
        body.refuse_unsupported()

    async def compiled(grammar: Grammar | None, param: str, request: Request) -> None:
        if grammar is not None and grammars is None:
            raise RequestError(f"{param} is not supported here", param, "unsupported_parameter")
        if grammar is not None and grammars is not None:
            await unless_gone(request, grammars.check(grammar, param, whose(request)))

    # Tokenizing takes seconds for megabytes; in a thread it does not hold the other streams up.
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check(body)
        grammar, calling = await asyncio.to_thread(body.grammar), body.calling()
        await compiled(grammar, "response_format", request)
        tokens = await asyncio.to_thread(model.chat_tokens, body.conversation(), calling.tools if calling else None)
        if calling is not None and model.tools is not None and (calling.forced or calling.strict):
            wanted = (calling.callable, calling.forced, calling.parallel)
            grammar = Grammar("tags", await asyncio.to_thread(model.tools.grammar, *wanted))
            await compiled(grammar, "tools", request)
        params = body.params(model.room(tokens, body.limit(), "messages"), body.wants_logprobs(), grammar)
        generation = Generation(engine, model, [tokens], [params], body.choices(), body.stops(), calling)
        shape = Chat("chatcmpl-" + secrets.token_hex(12), generation.started, model, body.wants_logprobs(),
                     calling is not None)  # fmt: skip
        return await _reply(generation, body, shape, request, gate, keep_alive)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check(body)
        prompts = [await asyncio.to_thread(model.prompt_tokens, prompt) for prompt in body.prompts()]
        params = [body.params(model.room(tokens, body.limit(), "prompt"), body.wants_logprobs()) for tokens in prompts]
        generation = Generation(engine, model, prompts, params, body.choices(), body.stops())
        shape = Completion("cmpl-" + secrets.token_hex(12), generation.started, model, body.wants_logprobs())
        if body.echo:
            return await _echo(generation, body, shape, request, scoring, gate, keep_alive)
        return await _reply(generation, body, shape, request, gate, keep_alive)

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        message = f"{model.name!r} generates text, it gives no embeddings; it is served on /v1/chat/completions"
        raise RequestError(message, None, "wrong_kind_of_model", 404)

    @app.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> JSON:
        tokens = await asyncio.to_thread(model.question_tokens, body.input)
        limit = model.room(tokens, body.max_tokens, "input")
        params = GenerationParams(limit, body.temperature, seed=body.seed)
        generation = Generation(engine, model, [tokens], [params])
        async with await _ticket(generation, request, gate):
            (piece,) = await unless_gone(request, generation.whole())
        return {"output": piece.text, "model": model.name, "finish_reason": piece.finish, "usage": generation.usage()}


async def _ticket(generation: Generation, request: Request, gate: Admission) -> Ticket:
    """What lets `generation` run, once there is room for it."""
    prompts, outputs = map(len, generation.prompts), [params.max_tokens for params in generation.params]
    beside = not any(outputs)  # nothing is generated, and the engine reads nothing
    prefix = None if beside else Prefix(generation.prompts[0])
    generation.ticket = await enter(gate, request, list(prompts), outputs, generation.n, prefix, beside)
    return generation.ticket


async def _reply(
    generation: Generation,
    body: Sampling,
    shape: Chat | Completion,
    request: Request,
    gate: Admission,
    keep_alive: float,
) -> Response:
    ticket = await _ticket(generation, request, gate)
    if not body.stream:
        async with ticket:
            pieces = await unless_gone(request, generation.whole())
        return JSONResponse(shape.whole(pieces, generation.usage()))
    try:  # errors up to the first piece, or for `keep_alive` seconds, still get their own status
        first, source = await unless_gone(request, begun(generation.pieces(), keep_alive))
    except BaseException as error:
        ticket.close(error)
        raise
    return Stream(_stream(generation, first, source, shape, body.told()), ticket.close, keep_alive)


async def _echo(
    generation: Generation,
    body: CompletionRequest,
    shape: Completion,
    request: Request,
    scoring: Scoring | None,
    gate: Admission,
    keep_alive: float,
) -> Response:
    """The prompt before the answer. It is computed whole also where it is streamed."""
    if body.logprobs is not None and scoring is None:
        raise RequestError(
            "scoring a prompt (echo with logprobs) is switched off here", "echo", "unsupported_parameter"
        )
    wanted = scoring if body.logprobs is not None else None
    generation.params = [replace(params, logprobs=True) for params in generation.params]  # for the tokens
    hidden = [await asyncio.to_thread(generation.model.added_tokens, prompt) for prompt in body.prompts()]
    async with await _ticket(generation, request, gate) as ticket:
        pieces = await unless_gone(request, echoed(generation, hidden, wanted, body.logprobs or 0))
        ticket.finish = ticket.finish or pieces[-1].finish
    if not body.stream:
        return JSONResponse(shape.whole(pieces, generation.usage()))

    async def source() -> AsyncGenerator[Piece, None]:
        for piece in pieces[1:]:
            yield piece

    return Stream(_stream(generation, pieces[0], source(), shape, body.told()), silence=keep_alive)


async def _stream(
    generation: Generation,
    first: Piece | None,
    source: AsyncGenerator[Piece, None],
    shape: Chat | Completion,
    told: StreamOptions,
) -> AsyncGenerator[str, None]:
    """Server-sent events. Without a `first` piece a comment says that the answer has begun."""
    usage, continuous = told.include_usage, bool(told.continuous_usage_stats)
    frames: dict[int, tuple[str, str]] = {}  # of each choice that has begun: what stands around a piece of mere text

    def failed(error: Exception) -> None:
        if generation.ticket is not None:
            generation.ticket.close(error)

    def built(piece: Piece) -> str:
        chunks = shape.chunks(piece, piece.index not in frames, continuous)
        so_far = {"usage": generation.usage() if continuous else None} if usage else {}
        return "".join(_event({**chunk, **so_far}) for chunk in chunks)

    def sent(piece: Piece) -> str:
        if piece.index in frames and piece.is_text and not continuous:
            before, after = frames[piece.index]
            return before + ENCODER.encode(piece.text) + after
        event = built(piece)
        if event and piece.index not in frames:
            frames[piece.index] = ("", "")  # from here on it is no first piece
            before, _, after = built(Piece(piece.index, MARK)).partition(ENCODER.encode(MARK))
            frames[piece.index] = before, after
        return event

    try:
        if event := COMMENT.decode() if first is None else sent(first):
            yield event
        async for piece in source:
            if event := sent(piece):
                yield event
        if usage:
            yield _event(shape.ending(generation.usage()))
    except LightshipError as error:
        failed(error)
        yield _event(errors.from_error(error)[1])
    except Exception as error:
        failed(error)
        log.exception("unexpected error in a stream")
        yield _event(errors.envelope("internal error", 500))
    finally:
        await source.aclose()
    yield "data: [DONE]\n\n"


def _event(data: JSON) -> str:
    return f"data: {ENCODER.encode(data)}\n\n"
