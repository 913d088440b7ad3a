"""Prefill and decode speed of an engine, one request at a time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import numpy as np

from lightship.engine import Engine, GenerationParams
from lightship.errors import LightshipError
from lightship.report import Metric


def measure(engine: Engine, *, prompt: int = 256, new_tokens: int = 64, repeats: int = 5) -> list[Metric]:
    """Median prefill and decode tokens/s over `repeats` after one warm-up; every prompt is new to the prefix cache."""
    vocabulary = int(engine.stats()["vocabulary"])
    random = np.random.default_rng(0)
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        tokens = random.integers(1, vocabulary, prompt).tolist()
        first, rest = once(engine, tokens, new_tokens)
        if repeat:
            prefill.append(prompt / first)
            decode.append((new_tokens - 1) / rest)
    return [
        _metric("prefill", prefill, f"{prompt} prompt tokens / time to the first new token; median, warm-up left out"),
        _metric("decode", decode, f"({new_tokens} − 1) / (end − first new token), one request, after {prompt} tokens; "
                                  "median, warm-up left out"),
    ]  # fmt: skip


def once(engine: Engine, tokens: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds from it to the last) of one greedy request of exact length."""
    began = time.perf_counter()
    engine.submit(tokens, GenerationParams(max_tokens=new_tokens, ignore_eos=True))
    first = 0.0
    got = 0
    while engine.busy():
        for event in engine.step():
            if event.token_ids and not got:
                first = time.perf_counter()
            got += len(event.token_ids)
    ended = time.perf_counter()
    if got != new_tokens:
        raise LightshipError(f"the engine gave {got} tokens instead of {new_tokens}")
    return first - began, ended - first


def _metric(name: str, values: list[float], method: str) -> Metric:
    """Median of `values` with its standard error (1.2533 σ/√n, normal)."""
    stderr = 1.2533 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Metric(name, statistics.median(values), "tokens/s", len(values), stderr, "higher", None, method)
