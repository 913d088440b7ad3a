"""Load time, prefill and decode speed of an engine, one request at a time; sequences a second of an encoder."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from lightship.engine import EncoderEngine, Engine, GenerationParams
from lightship.errors import EngineError, UsageError
from lightship.report import Metric

PROMPT = 256  # tokens
SHORTEST = 1e-9  # seconds; a clock too coarse for a request must not divide by zero


def measure_speed(
    open_engine: Callable[[], Engine],
    vocabulary: int | None = None,
    *,
    prompt: int = PROMPT,
    new_tokens: int = 64,
    repeats: int = 5,
) -> list[Metric]:
    """Load time (n = 1), then prefill and decode speed; the engine is closed again."""
    began = time.perf_counter()
    engine = open_engine()
    loaded = time.perf_counter() - began
    try:
        speeds = measure(engine, vocabulary, prompt=prompt, new_tokens=new_tokens, repeats=repeats)
    finally:
        engine.close()
    load = Metric("load", loaded, "s", 1, None, "lower", None, "open() once, files probably in the page cache")
    return [load, *speeds]


def measure(
    engine: Engine, vocabulary: int | None = None, *, prompt: int = PROMPT, new_tokens: int = 64, repeats: int = 5
) -> list[Metric]:
    """Median prefill and decode tokens/s over `repeats` after one warm-up; every prompt is new to the prefix cache.

    Prompts are random ids below `vocabulary` (default: the engine's), from a fresh seed: which ids they are does not
    change the work, but an engine measured twice must not find the first prompts in its cache.
    """
    if prompt < 1 or new_tokens < 2 or repeats < 1:
        raise UsageError(f"cannot measure {prompt} prompt tokens, {new_tokens} new ones, {repeats} repeats",
                         hint="at least 1 prompt token, 2 new tokens and 1 repeat are needed")  # fmt: skip
    stats = engine.stats()
    bound = int(stats["vocabulary"]) if vocabulary is None else vocabulary
    prompt = min(prompt, int(stats["context"]) - new_tokens)
    if prompt < 1:
        raise UsageError(f"a context of {stats['context']} tokens is too short to measure {new_tokens} new ones")
    random = np.random.default_rng()
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        first, rest, after = _timed(engine, random.integers(0, bound, prompt).tolist(), new_tokens)
        if repeat:
            prefill.append(prompt / max(first, SHORTEST))
            decode.append(after / max(rest, SHORTEST))
    return [
        _metric("prefill", prefill, f"{prompt} prompt tokens / (first new token − request), batch 1"),
        _metric("decode", decode, f"({new_tokens} − tokens of the first event) / (last − first new token), batch 1, "
                                  f"after {prompt} prompt tokens"),
    ]  # fmt: skip


BATCHES = (1, 32)
SEQUENCE = 48  # tokens
SINGLES = 16  # calls of a repeat at batch 1


def measure_encoder(
    open_engine: Callable[[], EncoderEngine], vocabulary: int, context: int, *, repeats: int = 5
) -> list[Metric]:
    """Load time (n = 1), then sequences/s in batches of 1 and of 32, each sequence of 48 tokens (the context, when that
    is shorter); random ids. Medians over `repeats` after one warm-up; a repeat at batch 1 is 16 calls."""
    if repeats < 1:
        raise UsageError(f"cannot measure {repeats} repeats", hint="at least 1 is needed")
    began = time.perf_counter()
    engine = open_engine()
    loaded = time.perf_counter() - began
    found = [Metric("load", loaded, "s", 1, None, "lower", None, "open() once, files probably in the page cache")]
    length, random = min(SEQUENCE, context), np.random.default_rng(0)
    for size in BATCHES:
        calls, speeds = SINGLES if size == 1 else 1, []
        for repeat in range(repeats + 1):
            ids = random.integers(0, vocabulary, (calls, size, length))
            mask, types = np.ones((size, length), np.int64), np.zeros((size, length), np.int64)
            began = time.perf_counter()
            for batch in ids:
                engine.run(batch, mask, types)
            if repeat:
                speeds.append(calls * size / max(time.perf_counter() - began, SHORTEST))
        found.append(_metric(f"batch{size}", speeds, f"sequences of {length} tokens, {size} at a time", "sequences/s"))
    engine.close()
    return found


def once(engine: Engine, tokens: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds from it to the last) of one greedy request of exact length."""
    first, rest, _ = _timed(engine, tokens, new_tokens)
    return first, rest


def _timed(engine: Engine, tokens: Sequence[int], new_tokens: int) -> tuple[float, float, int]:
    """As `once`, and the number of tokens that came after the first event."""
    began = time.perf_counter()
    engine.submit(tokens, GenerationParams(max_tokens=new_tokens, ignore_eos=True))
    first = last = began
    got = with_first = 0
    while engine.busy():
        for event in engine.step():
            if event.error or event.finish_reason in ("error", "cancelled"):
                raise EngineError(f"a request failed while speed was measured: {event.error or event.finish_reason}")
            if event.token_ids:
                last = time.perf_counter()
                if not got:
                    first, with_first = last, len(event.token_ids)
            got += len(event.token_ids)
    if got != new_tokens:
        raise EngineError(f"the engine gave {got} tokens instead of {new_tokens} while speed was measured")
    return first - began, last - first, got - with_first


def _metric(name: str, values: list[float], method: str, unit: str = "tokens/s") -> Metric:
    """Median of `values` with its standard error (1.2533 σ/√n, normal) and range."""
    stderr = 1.2533 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    spread = f"median of {len(values)}, {min(values):.4g} … {max(values):.4g}; one warm-up left out"
    middle = statistics.median(values)
    return Metric(name, middle, unit, len(values), stderr, "higher", None, f"{method}; {spread}")
