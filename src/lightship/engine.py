"""A loaded model: `Engine` generates, `EncoderEngine` encodes, `Scorer` returns all logits; `FakeEngine` for tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "tags"]
MAX_CONCURRENT = 64  # sequences that a server lets an engine compute together, unless it is told otherwise


@dataclass(frozen=True)
class Grammar:
    """What the text must be: JSON of the schema `text`, any JSON object, a match of a regular expression, a sentence of
    an EBNF grammar whose start is `root`, or structural tags (xgrammar's JSON). An engine that cannot hold an answer to
    it raises `RequestError`."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True)
class GenerationParams:
    """How to generate. `temperature` 0 is greedy; `seed` only matters above 0; `stop_token_ids` end the text unseen.

    `logprobs` asks for the log-probability of each chosen token: the model's own over the whole vocabulary, before
    penalties, temperature and grammar.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True)
class EngineSettings:
    """How to open a model for generation. None leaves the choice to the runtime folder's `engine.json`, then to the
    runtime. `max_num_seqs` requests are computed together at most; `kv_cache_gb` is the memory for keys and values in
    whole GiB; precisions are `f32`, `bf16`, `u8`, ….

    `prompt_lookup` tokens are proposed to each step from where the text said the same before, 0 for none (Saxena 2023,
    https://github.com/apoorvumang/prompt-lookup-decoding): the answer stays what it is, and comes sooner where it
    copies from the prompt. Or the model in the runtime folder `draft` proposes `draft_tokens`, see `lightship.draft`.
    """

    kv_cache_gb: int = 1
    max_num_seqs: int = 256
    max_batched_tokens: int = 512
    prefix_cache: bool = True
    inference_precision: str | None = None
    kv_precision: str | None = None
    dynamic_quantisation_group: int | None = None
    threads: int | None = None
    prompt_lookup: int = 0
    draft: str | None = None
    draft_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """What one request gained in a step: new tokens (stop tokens excluded), their log-probabilities when asked for,
    and, in its last event, why it finished. `at`: when the step returned, where that is known, by `time.monotonic`."""

    request_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    at: float | None = field(default=None, compare=False)


@runtime_checkable
class Engine(Protocol):
    """A model that generates for many requests at once. One thread drives it: `submit` and `cancel` between `step`s.

    Any exception from `step` means the engine is dead: discard it.
    """

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        """Queue a prompt and return its request id. Raises `RequestError` for foreign ids or a prompt too long."""
        ...

    def step(self) -> list[Event]:
        """Advance every running request by one step and return what is new."""
        ...

    def busy(self) -> bool:
        """Whether any request is unfinished."""
        ...

    def cancel(self, request_id: int) -> None:
        """End a request; an unknown or finished id is ignored."""
        ...

    def stats(self) -> dict[str, Any]:
        """Figures of the engine now: running, waiting, context, vocabulary size, …; `batching` says whether requests
        are computed together: `continuous`, or `none`, one at a time."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...


class Scorer(Protocol):
    """A model that returns the logits of every position: what gates and evaluation read."""

    def logits(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`ids`, `mask`: (batch, length), padding on the left. Returns (batch, length, vocabulary), float32."""
        ...


class EncoderEngine(Protocol):
    """A loaded encoder. One call at a time."""

    def run(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], types: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Each (batch, length), padding on the right. Returns, by kind of model: logits of a classifier
        (batch, labels), hidden states of an embedder (batch, length, width), or logits of start and end
        (batch, length, 2).
        """
        ...

    def close(self) -> None:
        """Release the model."""
        ...


@dataclass
class _FakeRequest:
    tokens: list[int]
    params: GenerationParams
    produced: int = 0
    steps: int = 0


@dataclass
class FakeEngine:
    """Generates `(last + 1) mod vocabulary`, one token a step: no model, the whole protocol. For tests of servers.

    Its faults are those of real engines: after `fail_after` steps it raises, after `hang_after` a step never returns,
    after `segfault_after` its process is gone; a step takes `slow` seconds and leaks `leak` bytes; a prompt takes
    `prefill` steps that give no token.

    With a `script` it says these tokens, over and over, whatever it is asked.
    """

    vocabulary: int = 256
    context: int = 2048
    eos_token_id: int | None = None
    fail_after: int | None = None
    hang_after: int | None = None
    segfault_after: int | None = None
    slow: float = 0.0
    prefill: int = 0
    leak: int = 0
    script: tuple[int, ...] = ()
    _leaked: list[bytes] = field(default_factory=list)
    _requests: dict[int, _FakeRequest] = field(default_factory=dict)
    _next_id: int = 0
    _steps: int = 0

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._next_id += 1
        self._requests[self._next_id] = _FakeRequest(list(tokens), params)
        return self._next_id

    def _fault(self) -> None:
        self._steps += 1
        if self.slow:
            time.sleep(self.slow)
        if self.leak:
            self._leaked.append(b"x" * self.leak)  # not zeros: those take no memory until they are read
        if self.fail_after is not None and self._steps > self.fail_after:
            raise RuntimeError("the fake engine was told to fail")
        if self.segfault_after is not None and self._steps > self.segfault_after:
            os.kill(os.getpid(), signal.SIGSEGV)
        while self.hang_after is not None and self._steps > self.hang_after:
            time.sleep(60)

    def step(self) -> list[Event]:
        self._fault()
        events = []
        for request_id, request in list(self._requests.items()):
            request.steps += 1
            if request.steps <= self.prefill:
                continue
            token = (request.tokens[-1] + 1) % self.vocabulary
            if self.script:
                token = self.script[request.produced % len(self.script)]
            stops = (*request.params.stop_token_ids, self.eos_token_id)
            if token in stops and not request.params.ignore_eos:
                events.append(Event(request_id, finish_reason="stop"))
                del self._requests[request_id]
                continue
            request.tokens.append(token)
            request.produced += 1
            done = request.produced >= request.params.max_tokens
            logprobs = (-0.5,) if request.params.logprobs else ()
            events.append(Event(request_id, (token,), logprobs, "length" if done else None))
            if done:
                del self._requests[request_id]
        return events

    def busy(self) -> bool:
        return bool(self._requests)

    def cancel(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def stats(self) -> dict[str, Any]:
        return {"running": len(self._requests), "context": self.context, "vocabulary": self.vocabulary,
                "batching": "continuous"}  # fmt: skip

    def close(self) -> None:
        self._requests.clear()
