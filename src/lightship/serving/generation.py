"""One HTTP request as the engine sees it: its prompts, n choices of each, every choice one request of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lightship.engine import Event, GenerationParams
from lightship.errors import EngineDied
from lightship.serving.model import ServedModel
from lightship.serving.supervisor import once_more
from lightship.serving.text import TextStream
from lightship.serving.ticket import Ticket
from lightship.serving.tokens import Shown, Token
from lightship.serving.tools.parser import Arguments, Parser, Start, Text
from lightship.serving.tools.schema import Calling

JSON = dict[str, Any]
RECOVERY = 60.0  # seconds that a request waits for an engine that is started again


class Generates(Protocol):
    """The engine behind the API, as `Supervisor` is."""

    def generate(self, tokens: Sequence[int], params: GenerationParams) -> AsyncGenerator[Event, None]:
        """The events of one request, the last with its finish reason. Raises `EngineDied`; leaving early cancels."""
        ...

    async def recovered(self, timeout: float) -> None:
        """Return when an engine that died is ready again. Raises `EngineDied` when it will not be in time."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one choice gained: text that is certain; its tokens when log-probabilities were asked for; how many tokens
    were computed for it; in its last piece, why it ended; and what it gained of tool calls."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    produced: int = 0
    finish: str | None = None
    calls: tuple[Start | Arguments, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it is some text and nothing else."""
        return bool(self.text) and self.finish is None and not self.tokens and not self.calls


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of a choice, 31 bits: that of the request for the first, so that asking for more changes nothing in it;
    for the others the first 4 bytes, little-endian, of the BLAKE2b hash of `<seed>:<choice>` in decimal."""
    if seed is None or choice == 0:
        return seed
    hashed = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=4).digest()
    return int.from_bytes(hashed, "little") & 0x7FFFFFFF


@dataclass
class Generation:
    """`n` choices of each prompt, in OpenAI's order: choice c of prompt p has the index p·n + c.

    Every choice is a request of its own in the engine, so they are computed together where the engine can do that.
    `params` are those of each prompt; their seed is derived for each choice, see `choice_seed`. `calling` says what
    tools the answers may call; `ticket` hears of every token, and holds it to its deadlines.
    """

    engine: Generates
    model: ServedModel
    prompts: Sequence[Sequence[int]]
    params: Sequence[GenerationParams]
    n: int = 1
    stops: Sequence[str] = ()
    calling: Calling | None = None
    ticket: Ticket | None = None
    produced: int = 0  # tokens of the answer, the end-of-text token and what came after its end not counted
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def _place(self) -> Generates:
        """The engine that its ticket was let in for."""
        return self.engine if self.ticket is None or self.ticket.seat is None else self.ticket.seat

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices as they come. An engine that dies before the first is waited for, and asked once
        more; closing this early cancels what runs in it."""
        given = False
        try:
            async with contextlib.aclosing(self._attempt()) as pieces:
                async for piece in pieces:
                    given = True
                    yield piece
            return
        except EngineDied:
            if given:
                raise
        await self.recovered(RECOVERY)
        async with contextlib.aclosing(self._attempt()) as pieces:
            async for piece in pieces:
                yield piece

    async def whole(self) -> list[Piece]:
        """Every choice as one piece, in order. As long as nothing was sent an engine that dies is no error: it is
        waited for, and asked once more."""

        async def everything() -> list[Piece]:
            async with contextlib.aclosing(self._attempt()) as pieces:
                return _joined([piece async for piece in pieces], len(self.prompts) * self.n)

        return await once_more(everything, lambda: False, self, RECOVERY)

    async def recovered(self, timeout: float) -> None:
        """Wait for an engine that is started again, no longer than the ticket allows. Raises as that does."""
        async with self.ticket.in_time() if self.ticket is not None else contextlib.nullcontext():
            await self._place.recovered(timeout)

    async def _attempt(self) -> AsyncGenerator[Piece, None]:
        self.produced = 0
        if self.ticket is not None:
            self.ticket.begin()
        choices = [
            self._answer(place * self.n + choice, prompt, replace(params, seed=choice_seed(params.seed, choice)))
            for place, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True))
            for choice in range(self.n)
        ]
        async with contextlib.aclosing(choices[0] if len(choices) == 1 else _merged(choices)) as pieces:
            async for piece in pieces:
                self.produced += piece.produced
                if piece.finish is not None and self.ticket is not None:
                    self.ticket.finish = "length" if piece.finish == "length" else "stop"
                yield piece

    def _answer(self, index: int, prompt: Sequence[int], params: GenerationParams) -> AsyncGenerator[Piece, None]:
        """The pieces of one choice."""
        pieces, tools = self._choice(index, prompt, params), self.model.tools
        if self.calling is None or tools is None:
            return pieces
        parser = tools.parser(self.calling.names, parallel=self.calling.parallel, sure=self.calling.forced)
        return _called(pieces, parser, self.calling.named)

    def _hidden(self) -> Collection[int] | None:
        """The tokens that are no part of the text; in an answer held to a grammar all are, since it counted them."""
        if self.calling is None and any(params.grammar is not None for params in self.params):
            return frozenset()
        if self.calling is None or self.model.tools is None:
            return None
        return self.model.tools.hidden(self.model.tokenizer, forced=self.calling.forced)

    async def _choice(self, index: int, prompt: Sequence[int], params: GenerationParams) -> AsyncGenerator[Piece, None]:
        hidden = self._hidden()
        text = TextStream(self.model.tokenizer, self.stops, hidden)
        shown = Shown(self.model.token_bytes, hidden) if params.logprobs else None
        finish = "stop"
        generated = self._place.generate(prompt, params)
        watched = generated if self.ticket is None else self.ticket.watch(generated)
        async with contextlib.aclosing(watched) as events:
            async for event in events:
                for part in self._parts(event):
                    new = text.push(part.token_ids)
                    if shown is not None:
                        shown.push(part.token_ids, part.logprobs)
                    tokens = shown.take(new, cut=text.stopped) if shown else ()
                    if text.stopped:
                        yield Piece(index, new, tokens, len(part.token_ids), "stop")
                        return
                    yield Piece(index, new, tokens, len(part.token_ids))
                finish = event.finish_reason or finish
        rest = text.finish()
        tokens = shown.take(rest, ended=True, cut=text.stopped) if shown else ()
        yield Piece(index, rest, tokens, 0, "stop" if text.stopped else finish)

    def _parts(self, event: Event) -> Sequence[Event]:
        """`event` a token at a time where the text may end the answer: what was computed after that is not counted, so
        that the usage does not depend on how many tokens came together."""
        if len(event.token_ids) < 2 or not (self.stops or self.calling):
            return [event]
        return [
            replace(event, token_ids=(token,), logprobs=event.logprobs[place : place + 1])
            for place, token in enumerate(event.token_ids)
        ]

    def usage(self) -> JSON:
        """Token counts of the whole request; a prompt counts once however many choices it has."""
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.produced, "total_tokens": prompt + self.produced}


async def _called(pieces: AsyncGenerator[Piece, None], parser: Parser, named: bool) -> AsyncGenerator[Piece, None]:
    """`pieces` of one choice with their text read into content and calls. It ends with the last call that may be, for a
    reason of its own unless the function was `named`, as OpenAI's does."""
    called = False
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            found = parser.push(piece.text) + (parser.finish() if piece.finish is not None else [])
            calls = tuple(delta for delta in found if not isinstance(delta, Text))
            called = called or bool(calls)
            finish = "stop" if parser.done else piece.finish
            if called and finish == "stop" and not named:
                finish = "tool_calls"
            content = "".join(delta.text for delta in found if isinstance(delta, Text))
            yield replace(piece, text=content, finish=finish, calls=calls)
            if parser.done:
                return


async def _merged(choices: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of several choices in the order in which they come; the error of one ends all."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def drain(choice: AsyncGenerator[Piece, None]) -> None:
        ended: BaseException | None = None
        try:
            async with contextlib.aclosing(choice):
                async for piece in choice:
                    queue.put_nowait(piece)
        except Exception as error:
            ended = error
        queue.put_nowait(ended)

    tasks = [asyncio.create_task(drain(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The pieces of each choice as one."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        found[piece.index].append(piece)
    return [
        Piece(index, "".join(piece.text for piece in own), tuple(token for piece in own for token in piece.tokens),
              sum(piece.produced for piece in own), own[-1].finish,
              tuple(call for piece in own for call in piece.calls))
        for index, own in enumerate(found)
    ]  # fmt: skip
