"""The JSON shapes of OpenAI's two completion routes, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightship.serving.generation import Piece
from lightship.serving.model import ServedModel
from lightship.serving.tokens import Token, as_chat, as_legacy
from lightship.serving.tools.parser import Arguments, Start

JSON = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A chat completion; `tools`: one that may call functions."""

    id: str
    created: int
    model: ServedModel
    logprobs: bool = False
    tools: bool = False

    def _body(self, kind: str, choices: Sequence[JSON]) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name,
                "system_fingerprint": self.model.fingerprint, "choices": list(choices)}  # fmt: skip

    def _scores(self, tokens: Sequence[Token]) -> JSON | None:
        return {"content": [as_chat(token) for token in tokens], "refusal": None} if self.logprobs else None

    def whole(self, pieces: Sequence[Piece], usage: JSON) -> JSON:
        """The response in one piece."""
        choices = [
            {"index": piece.index, "message": _message(piece),
             "logprobs": self._scores(piece.tokens), "finish_reason": piece.finish}
            for piece in pieces
        ]  # fmt: skip
        return {**self._body("chat.completion", choices), "usage": usage}

    def _chunk(self, index: int, delta: JSON, logprobs: JSON | None = None, finish: str | None = None) -> JSON:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._body("chat.completion.chunk", [choice])

    def chunks(self, piece: Piece, first: bool, counted: bool = False) -> list[JSON]:
        """What is streamed for a piece, the `first` of its choice or a later one. `counted`: tokens without a text,
        such as parts of a character, have a chunk too, for the usage that is told with it."""
        empty = not (piece.text or piece.tokens or piece.calls or piece.finish)
        if self.tools and empty:  # whether an answer has content shows with its first word, or its first call
            return []
        opening = {"role": "assistant", "content": None if piece.calls and not piece.text else ""}
        found = [self._chunk(piece.index, opening)] if first else []
        if piece.text or piece.tokens or (counted and piece.produced and empty):
            found.append(self._chunk(piece.index, {"content": piece.text}, self._scores(piece.tokens)))
        found += [self._chunk(piece.index, {"tool_calls": [_part(delta)]}) for delta in piece.calls]
        if piece.finish is not None:
            found.append(self._chunk(piece.index, {}, finish=piece.finish))
        return found

    def ending(self, usage: JSON) -> JSON:
        """The last chunk, where usage was asked for."""
        return {**self._body("chat.completion.chunk", []), "usage": usage}


def _message(piece: Piece) -> JSON:
    """The whole answer."""
    message: JSON = {"role": "assistant", "content": piece.text, "refusal": None}
    if piece.calls:
        calls = [
            {"id": start.id, "type": "function", "function": {"name": start.name, "arguments": "".join(
                delta.text for delta in piece.calls if isinstance(delta, Arguments) and delta.index == start.index)}}
            for start in piece.calls if isinstance(start, Start)
        ]  # fmt: skip
        message |= {"content": piece.text or None, "tool_calls": calls}
    return message


def _part(delta: Start | Arguments) -> JSON:
    """What is streamed of a call."""
    if isinstance(delta, Start):
        return {"index": delta.index, "id": delta.id, "type": "function",
                "function": {"name": delta.name, "arguments": ""}}  # fmt: skip
    return {"index": delta.index, "function": {"arguments": delta.text}}


@dataclass(frozen=True)
class Completion:
    """A text completion."""

    id: str
    created: int
    model: ServedModel
    logprobs: bool = False

    def _body(self, choices: Sequence[JSON]) -> JSON:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model.name,
                "system_fingerprint": self.model.fingerprint, "choices": list(choices)}  # fmt: skip

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> JSON:
        logprobs = as_legacy(tokens, self.model.token_bytes) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, pieces: Sequence[Piece], usage: JSON) -> JSON:
        """The response in one piece."""
        choices = [self._choice(piece.index, piece.text, piece.tokens, piece.finish) for piece in pieces]
        return {**self._body(choices), "usage": usage}

    def chunks(self, piece: Piece, first: bool, counted: bool = False) -> list[JSON]:
        """As of a chat; a chunk has the shape of the whole."""
        found = []
        if piece.text or piece.tokens or (counted and piece.produced and piece.finish is None):
            found.append(self._body([self._choice(piece.index, piece.text, piece.tokens, None)]))
        if piece.finish is not None:
            choice = {"index": piece.index, "text": "", "logprobs": None, "finish_reason": piece.finish}
            found.append(self._body([choice]))
        return found

    def ending(self, usage: JSON) -> JSON:
        """The last chunk, where usage was asked for."""
        return {**self._body([]), "usage": usage}
