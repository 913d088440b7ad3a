"""OpenVINO, the decoders: continuous batching by OpenVINO GenAI. `openvino.py` opens and exports them."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import context_length
from lightship.draft import cache_gb
from lightship.engine import EngineSettings, Event, FinishReason, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, UnsupportedError
from lightship.targets import _openvino_grammar

BATCHING = "continuous"
BLOCK_TOKENS = 32  # of one block of the paged KV cache on a processor
NGRAM = 3  # tokens at the end of the text, at most, that prompt lookup searches for


class OpenVINOEngine:
    """Continuous batching over the paged KV cache of OpenVINO GenAI. Bounds every request before the runtime sees it:
    it would accept foreign ids and prompts beyond the context, and answer garbage."""

    def __init__(self, folder: Path, settings: EngineSettings, properties: Mapping[str, Any]) -> None:
        """`properties`: what OpenVINO is to compile `folder` with. Raises `EngineError` when it cannot be served."""
        import openvino_genai as genai

        config = json.loads((folder / "config.json").read_text())
        self.context = context_length(config) or 2048
        self.vocabulary: int = config["vocab_size"]
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        eos = config.get("eos_token_id") if eos is None else eos
        self.eos_token_ids: tuple[int, ...] = () if eos is None else ((eos,) if isinstance(eos, int) else tuple(eos))
        self._genai = genai
        self._drafted = settings.draft is not None
        if self._drafted and (settings.prompt_lookup or settings.draft_tokens < 1):
            raise UnsupportedError(f"a draft with draft_tokens {settings.draft_tokens} and prompt_lookup "
                                   f"{settings.prompt_lookup}", hint="the first must be 1 at least, the second 0"
                                   )  # fmt: skip
        self._proposed = settings.draft_tokens if self._drafted else settings.prompt_lookup
        given = {**properties, "prompt_lookup": True} if settings.prompt_lookup else dict(properties)
        try:
            if settings.draft is not None:
                given["draft_model"] = self._draft(folder, Path(settings.draft), settings, properties)
            scheduler = self._scheduler(settings, settings.kv_cache_gb)
            self._pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", given)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO GenAI cannot serve {folder} by continuous batching: {str(error).strip().splitlines()[-1]}",
                hint="try it without the draft" if self._drafted else "try --target onnx",
            ) from error
        self._most = settings.max_num_seqs  # the runtime's own bound does not hold where prefill and decode are mixed
        self._waiting: deque[tuple[int, Sequence[int], Any, tuple[int, ...]]] = deque()
        self._running: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self._held: dict[int, int] = {}  # blocks that a request may need at most, where tokens are proposed
        self._together = settings.max_batched_tokens  # tokens of the prompts that one step begins to read
        self._leaving = 0  # blocks of those cancelled, which the pipeline frees at the end of its next step
        self._next_id = 0
        self._blocks: int | None = None
        self._blocks = self._count_blocks()

    def _scheduler(self, settings: EngineSettings, cache: int) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = cache
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = settings.max_batched_tokens
        if self._drafted:
            # A pipeline with a draft (2026.4) says a token twice where the draft has read a prompt before the model: so
            # each is read whole, in one step, beside all that is proposed and those that were cancelled a moment ago.
            longest = max(self.context, settings.max_batched_tokens)
            scheduler.max_num_batched_tokens = longest + settings.max_num_seqs * (self._proposed + 1)
            scheduler.max_num_seqs *= 2
        scheduler.enable_prefix_caching = settings.prefix_cache
        return scheduler

    def _draft(self, folder: Path, draft: Path, settings: EngineSettings, properties: Mapping[str, Any]) -> Any:
        """The draft with a cache of its own, which holds as many tokens: left to itself, the runtime (2026.4) divides
        whole GiB. It computes as the model does, since its arithmetic changes no answer."""
        self.context = min(self.context, context_length(json.loads((draft / "config.json").read_text())) or 2048)
        scheduler = self._scheduler(settings, cache_gb(folder, draft, settings.kv_cache_gb))
        return self._genai.draft_model(str(draft), "CPU", **properties, scheduler_config=scheduler)

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self._check(tokens, params)
        self._next_id += 1
        stops = () if params.ignore_eos else self._stops(params)
        config = self._config(params)
        self._hold(self._next_id, len(tokens) + params.max_tokens)
        self._waiting.append((self._next_id, tokens, config, stops))
        return self._next_id

    def _add(self, request_id: int, tokens: Sequence[int], config: Any, stops: tuple[int, ...]) -> None:
        import openvino as ov

        ids = ov.Tensor(np.array([tokens], dtype=np.int64))
        self._running[request_id] = (self._pipeline.add_request(request_id, ids, config), stops)

    def _hold(self, request_id: int, length: int) -> None:
        """Note the blocks of a request with `length` tokens and those proposed beyond. A pipeline with proposals that
        runs out of blocks gives up on a request, or dies (2026.4): those that do not fit wait instead."""
        if not self._proposed or self._blocks is None:
            return
        needed = -(-(length + self._proposed) // BLOCK_TOKENS)
        if needed > self._blocks:
            raise RequestError(
                f"{length} tokens and {self._proposed} proposed ones do not fit into the KV cache of "
                f"{self._blocks * BLOCK_TOKENS}", "prompt", "context_length_exceeded",
            )  # fmt: skip
        self._held[request_id] = needed

    def _has_room(self, request_id: int) -> bool:
        """Whether the first that waits fits beside those that run."""
        if self._blocks is None:
            return True
        held = sum(self._held.get(other, 0) for other in (*self._running, request_id))
        return held + self._leaving <= self._blocks

    def _check(self, tokens: Sequence[int], params: GenerationParams) -> None:
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", "prompt", "invalid_token_id")
        if len(tokens) + params.max_tokens > self.context:
            raise ContextTooLong(
                f"{len(tokens)} prompt tokens and {params.max_tokens} new ones exceed the context of {self.context}"
            )

    def _stops(self, params: GenerationParams) -> tuple[int, ...]:
        return (*self.eos_token_ids, *params.stop_token_ids)

    def _config(self, params: GenerationParams) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = params.max_tokens
        config.ignore_eos = params.ignore_eos
        if not params.ignore_eos and self._stops(params):
            stops = self._stops(params)
            config.set_eos_token_id(stops[0])  # without it the pipeline does not stop at stop_token_ids either
            config.stop_token_ids = set(stops)
        if self._proposed:  # such a pipeline takes no request without them
            # Of a draft without an n-gram size the runtime (2026.4) takes sampled tokens by the quotient of two
            # probabilities of different tokens; with one, those only that the model sampled itself.
            config.num_assistant_tokens, config.max_ngram_size = self._proposed, NGRAM
        config.logprobs = 1 if params.logprobs else 0
        config.presence_penalty = params.presence_penalty
        config.frequency_penalty = params.frequency_penalty
        config.repetition_penalty = params.repetition_penalty
        if params.temperature > 0:
            config.do_sample = True
            config.temperature = params.temperature
            config.top_p = params.top_p
            config.top_k = params.top_k or self.vocabulary
            if params.min_p > 0:
                config.min_p = params.min_p
            config.rng_seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "little")
        if params.grammar is not None:
            config.structured_output_config = _openvino_grammar.config(params.grammar)
        return config

    def prompt_logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """log p(token[i] | tokens before i) for i ≥ 1 on the served path, shape (len(tokens) − 1,).

        Only right with the prefix cache off: with a hit the runtime leaves positions out.
        """
        config = self._config(GenerationParams(max_tokens=1, ignore_eos=True, logprobs=True))
        config.echo = True
        self._next_id += 1
        self._add(self._next_id, tokens, config, ())
        values: list[float] = []
        while self.busy():
            for event in self.step():
                values.extend(event.logprobs)
        if len(values) != len(tokens) + 1:
            raise EngineError(
                f"{len(values)} prompt log-probabilities for {len(tokens)} tokens: is the prefix cache on?"
            )
        return np.array(values[1 : len(tokens)], np.float32)

    def step(self) -> list[Event]:
        reads = 0  # tokens of prompts
        while self._waiting and len(self._running) < self._most and self._has_room(self._waiting[0][0]):
            length = len(self._waiting[0][1])
            if self._drafted and reads and reads + length > self._together:
                break
            reads += length
            self._add(*self._waiting.popleft())
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._leaving = 0
        return [event for request_id in list(self._running) if (event := self._read(request_id)) is not None]

    def _read(self, request_id: int) -> Event | None:
        handle, stops = self._running[request_id]
        tokens: list[int] = []
        logprobs: list[float] = []
        while handle.can_read():
            for output in handle.read().values():
                tokens.extend(output.generated_ids)
                logprobs.extend(output.generated_log_probs)
        reason = self._reason(handle, tokens, stops)
        if reason is not None:
            del self._running[request_id]
            self._held.pop(request_id, None)
        if reason == "stop" and tokens and tokens[-1] in stops:
            tokens, logprobs = tokens[:-1], logprobs[: len(tokens) - 1]
        if not tokens and not logprobs and reason is None:
            return None
        error = "the KV cache is exhausted" if reason == "error" else None
        return Event(request_id, tuple(tokens), tuple(logprobs), reason, error)

    def _reason(self, handle: Any, tokens: list[int], stops: tuple[int, ...]) -> FinishReason | None:
        status = handle.get_status()
        kinds = self._genai.GenerationStatus
        if status == kinds.RUNNING:
            return None
        if status == kinds.FINISHED:
            return "stop" if tokens and tokens[-1] in stops else "length"
        return "cancelled" if status in (kinds.CANCEL, kinds.STOP) else "error"

    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def cancel(self, request_id: int) -> None:
        held = self._held.pop(request_id, 0)
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != request_id)
        if request_id in self._running:
            self._leaving += held
            handle, _ = self._running.pop(request_id)
            handle.cancel()

    def _count_blocks(self) -> int | None:
        """Blocks of the KV cache: one step of a short prompt takes one of them, and the pipeline tells its share. None
        where it tells none."""
        request_id = self.submit([0], GenerationParams(max_tokens=2, ignore_eos=True))
        self.step()
        share: float = self._pipeline.get_metrics().cache_usage
        self.cancel(request_id)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return round(100 / share) if share > 0 else None

    def stats(self) -> dict[str, Any]:
        usage = self._pipeline.get_metrics().cache_usage / 100 if self._running else 0.0  # it is stale when idle
        return {"running": len(self._running), "waiting": len(self._waiting), "context": self.context,
                "vocabulary": self.vocabulary, "batching": BATCHING, "blocks": self._blocks,
                "block_tokens": BLOCK_TOKENS, "cache_usage": usage}  # fmt: skip

    def close(self) -> None:
        for request_id in list(self._running):
            self.cancel(request_id)
        del self._pipeline
        _drop_signal_stack()


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2) on Linux."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def _drop_signal_stack() -> None:
    """Let this thread take signals on its ordinary stack.

    Each instance of OpenVINO's CPU plugin (2026.4) gives its thread a signal stack and puts back the one before when it
    ends. A pipeline's instances end in another order than they began, which leaves the thread with a stack that is
    freed: the next signal, such as Ctrl-C, is then a segmentation fault.
    """
    if sys.platform == "linux":
        disable = 2  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, disable, 0)), None)
