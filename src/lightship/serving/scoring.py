"""Scoring what a client gives: `echo` with `logprobs`, on logits of every position.

The serving engine has none of a prompt, so the same weights are opened a second time, in a process of their own, with
the first question that needs them.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightship.engine import EngineSettings
from lightship.errors import EngineDied, EngineError
from lightship.find import find
from lightship.sampling import log_softmax
from lightship.serving.child import Child, ChildFailed, answer
from lightship.serving.generation import Generation, Piece
from lightship.serving.placement import Place
from lightship.serving.tokens import Alternatives, Line, Token

log = logging.getLogger("lightship.serving")
BLOCK = 64  # positions whose logits are held at a time
Score = tuple[float | None, Alternatives | None]  # of one token: None for the first, which nothing precedes


class Scoring:
    """The parent's side. One text at a time."""

    def __init__(self, target: str, folder: Path, settings: EngineSettings, place: Place | None = None) -> None:
        """`place`: where it runs, which may be with fewer threads than an engine has."""
        place = place or Place()
        if place.threads is not None:
            settings = replace(settings, threads=min(settings.threads or place.threads, place.threads))
        arguments = [target, str(folder), json.dumps(asdict(settings))]
        self._child = Child("lightship.serving.scoring", arguments, folder, cores=place.cores)
        self._announced: int | None = None

    async def score(self, tokens: Sequence[int], top: int) -> list[Score]:
        """log p(token | those before it), natural, for each of `tokens`, with the `top` likeliest of its place.

        Raises `EngineDied` when the process ends, `EngineError` for scores that are not all there.
        """
        try:
            reply = await self._child.ask({"tokens": list(tokens), "top": top})
        except ChildFailed as error:
            raise EngineDied(f"the text could not be scored: {error}") from error
        if self._announced != self._child.pid:
            self._announced = self._child.pid
            log.warning("scoring texts: the model is loaded a second time, %d MiB", self._child.memory >> 20)
        logprobs, tops = reply["logprobs"], reply["tops"]
        if len(logprobs) != len(tokens) - 1 or not all(map(math.isfinite, logprobs)):
            raise EngineError(f"{len(logprobs)} scores for {len(tokens)} tokens, or some that are no numbers")
        alternatives = (
            [tuple((number, value) for number, value in each) for each in tops] if top else [None] * len(tops)
        )
        return [(None, None), *zip(logprobs, alternatives, strict=True)]

    async def close(self) -> None:
        """End the process."""
        await self._child.close()


async def echoed(
    generation: Generation, hidden: Sequence[Sequence[bool]], scoring: Scoring | None, top: int
) -> list[Piece]:
    """Each choice with its prompt before it; every token scored where `scoring` is given.

    `hidden` marks, for each prompt, the tokens that the tokenizer added by itself: they are scored and not shown. No
    token is generated where `params` ask for none.
    """
    if generation.params[0].max_tokens:
        pieces = await generation.whole()
    else:
        pieces = [Piece(index, "", finish="length") for index in range(len(generation.prompts) * generation.n)]
    return [
        await _with_prompt(generation, piece, hidden[piece.index // generation.n], scoring, top) for piece in pieces
    ]


async def _with_prompt(
    generation: Generation, piece: Piece, hidden: Sequence[bool], scoring: Scoring | None, top: int
) -> Piece:
    prompt = list(generation.prompts[piece.index // generation.n])
    new = [token.id for token in piece.tokens]
    scores: list[Score] = [(None, None)] * (len(prompt) + len(new))
    if scoring is not None:
        scores = await scoring.score(prompt + new, top)
    line = Line(generation.model.token_bytes)
    tokens = [
        line.add(number, *score, special=True, hidden=mark)
        for number, score, mark in zip(prompt, scores, hidden, strict=False)
    ]
    before = _joined(generation, tokens, prompt)
    tokens += [line.add(number, *score) for number, score in zip(new, scores[len(prompt) :], strict=True)]
    return replace(piece, text=before + piece.text, tokens=tuple(tokens))


def _joined(generation: Generation, tokens: Sequence[Token], ids: Sequence[int]) -> str:
    raw = [token.bytes for token in tokens if token.bytes is not None]
    if len(raw) < len(tokens):
        return str(generation.model.tokenizer.decode(list(ids)))
    return b"".join(raw).decode("utf-8", "replace")


# ── The child's side ────────────────────────────────────────────────────────


def _load(target: str, folder: Path, settings: EngineSettings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    scorer = find("targets", target).open_scorer(folder, settings)

    def reply(question: dict[str, Any]) -> dict[str, Any]:
        ids = np.array([question["tokens"]], np.int64)
        logprobs: list[float] = []
        tops: list[list[tuple[int, float]]] = []
        for start, logits in enumerate(scorer.blocks(ids, np.ones_like(ids), BLOCK)):
            following = ids[0, start * BLOCK + 1 : (start + 1) * BLOCK + 1]
            rows = log_softmax(logits[0, : len(following)])
            logprobs.extend(float(row[token]) for row, token in zip(rows, following, strict=True))
            tops.extend(_likeliest(row, question["top"]) for row in rows)
        return {"logprobs": logprobs, "tops": tops}

    return reply


def _likeliest(row: np.ndarray[Any, np.dtype[np.float64]], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens, the smallest id first among equals."""
    if not count:
        return []
    least = np.partition(row, -count)[-count]
    chosen = np.flatnonzero(row >= least)
    order = chosen[np.argsort(-row[chosen], kind="stable")][:count]
    return [(int(token), float(row[token])) for token in order]


if __name__ == "__main__":
    target, folder, settings = sys.argv[3:]
    answer(int(sys.argv[1]), sys.argv[2], lambda: _load(target, Path(folder), EngineSettings(**json.loads(settings))))
