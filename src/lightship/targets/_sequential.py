"""What the engines share that take one request at a time: first come, first served, greedy or sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.engine import EngineSettings, Event, GenerationParams
from lightship.errors import RequestError, UnsupportedError
from lightship.sampling import choose, log_softmax

BATCHING = "none"


def refuse_lookup(settings: EngineSettings) -> None:
    """Raise `UnsupportedError` for prompt lookup and drafts."""
    if settings.draft is not None:
        raise UnsupportedError("a draft is there for decoders served with OpenVINO only", hint="leave it out")
    if settings.prompt_lookup:
        raise UnsupportedError("prompt lookup is there for decoders served with OpenVINO only",
                               hint="leave prompt_lookup at 0")  # fmt: skip


@dataclass
class Request:
    """A prompt, what was produced after it, and what the engine keeps for it."""

    id: int
    prompt: list[int]
    params: GenerationParams
    random: np.random.Generator
    kept: Any
    produced: list[int] = field(default_factory=list)


class Sequential:
    """The queue of an engine, and the end of its steps. Log-probabilities are the model's own, before penalties and
    temperature."""

    def __init__(self, context: int, vocabulary: int, eos_token_ids: tuple[int, ...]) -> None:
        self.context, self.vocabulary, self.eos_token_ids = context, vocabulary, eos_token_ids
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._next_id = 0

    def _queue(self, tokens: Sequence[int], params: GenerationParams, kept: Any = None) -> int:
        if params.grammar is not None:
            raise RequestError("this model's engine cannot hold an answer to a grammar; serve it with OpenVINO",
                               "response_format", "unsupported_parameter")  # fmt: skip
        self._next_id += 1
        random = np.random.default_rng(params.seed)
        self._waiting.append(Request(self._next_id, list(tokens), params, random, kept))
        return self._next_id

    def _end(self, event: Event) -> list[Event]:
        """The running request is finished by `event`."""
        self._running = None
        return [event]

    def _produce(self, request: Request, logits: npt.NDArray[np.floating], seen: Sequence[int]) -> list[Event]:
        """Choose a token of `request` by `logits` (vocabulary,), penalised for what was `seen` and produced."""
        params = request.params
        token = choose(logits, seen, request.produced, params, request.random)
        if not params.ignore_eos and token in (*self.eos_token_ids, *params.stop_token_ids):
            return self._end(Event(request.id, finish_reason="stop"))
        request.produced.append(token)
        logprobs = (float(log_softmax(logits)[token]),) if params.logprobs else ()
        if len(request.produced) >= params.max_tokens:
            return self._end(Event(request.id, (token,), logprobs, "length"))
        return [Event(request.id, (token,), logprobs)]

    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self._running is not None or bool(self._waiting)

    def cancel(self, request_id: int) -> None:
        """End a request; an unknown or finished id is ignored."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        if self._running is not None and self._running.id == request_id:
            self._running = None

    def stats(self) -> dict[str, Any]:
        """See `Engine`."""
        running = self._running is not None
        return {"running": int(running), "waiting": len(self._waiting), "context": self.context,
                "vocabulary": self.vocabulary, "batching": BATCHING}  # fmt: skip

    def close(self) -> None:
        """Forget every request."""
        self._waiting.clear()
        self._running = None
