"""/metrics for Prometheus: vLLM's names and buckets under `lightship:`, so that what knows the one reads the other."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample
from starlette.types import ASGIApp, Receive, Scope, Send

from lightship.serving.admission import Snapshot
from lightship.serving.ticket import Ticket

OURS, THEIRS = "lightship:", "vllm:"
# The boundaries of vLLM 0.32 (vllm/v1/metrics/buckets.py); those of token counts: see `token_buckets`.
LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
           960.0, 1920.0, 7680.0)  # fmt: skip
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
               80.0, 160.0, 640.0, 2560.0)  # fmt: skip
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                  80.0)  # fmt: skip
REASONS = ("stop", "length", "abort", "error", "timeout")  # vLLM has the first four
REJECTIONS = ("queue_full", "queue_slow", "requests_per_minute", "tokens_per_minute", "too_large", "deadline")
# What vLLM exports too; the rest is ours alone and gets no alias.
ALIASED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
           "request_success", "admission_rejections", "request_prompt_tokens", "request_generation_tokens",
           "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
           "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")  # fmt: skip
WITHOUT_ENGINE = "vllm:admission_rejections"  # vLLM gives every other one the label `engine`


def token_buckets(context: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `context` tokens."""
    steps = (digit * 10**power for power in range(len(str(context))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= context)


class Metrics:
    """The metrics of one server, in a registry of their own. A `ticket.Observer`: admission tells it of every
    request. `watch` adds what is read when it is asked for.

    Hits of the prefix cache (`prefix_cache_queries`, `prefix_cache_hits`) are not there: OpenVINO GenAI's
    `PipelineMetrics` does not tell them. `kv_cache_usage_perc` (0 … 1, what is really used) is NaN for an engine that
    does not tell it; `kv_blocks_reserved` is what admission has promised.
    """

    def __init__(self, model: str, context: int, aliases: bool = False) -> None:
        """`model`: the label `model_name` of everything; `context` in tokens; `aliases`: export vLLM's names too."""
        self.registry = CollectorRegistry()
        self._model, self._aliases = model, aliases
        tokens = token_buckets(context)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens that were read.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were produced.")
        self._between = self._histogram("inter_token_latency_seconds", "Time between two tokens.", BETWEEN_TOKENS)
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to admission.", LATENCY)
        self._prefill = self._histogram("request_prefill_time_seconds", "From admission to the first token.", LATENCY)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the end.", LATENCY)
        self._prompts = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._outputs = self._histogram("request_generation_tokens", "Tokens produced for a request.", tokens)
        self._success = Counter(f"{OURS}request_success", "Requests that ended, by reason.",
                                ["model_name", "finished_reason"], registry=self.registry)  # fmt: skip
        self._rejections = Counter(f"{OURS}admission_rejections", "Requests that were not let in, by reason.",
                                   ["model_name", "reason"], registry=self.registry)  # fmt: skip
        self._responses = Counter(f"{OURS}http_responses", "HTTP responses, by status; 499: the client left before.",
                                  ["model_name", "status"], registry=self.registry)  # fmt: skip
        for reason in REASONS:  # so that a rate can be built from the first one on
            self._success.labels(model, reason)
        for reason in REJECTIONS:
            self._rejections.labels(model, reason)
        for status in (200, 429, 500, 503):
            self._responses.labels(model, str(status))

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(OURS + name, says, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(OURS + name, says, ["model_name"], registry=self.registry, buckets=buckets)
        return made.labels(self._model)

    # ── What admission tells ────────────────────────────────────────────────

    def rejected(self, reason: str) -> None:
        """A request was not let in."""
        self._rejections.labels(self._model, reason).inc()

    def admitted(self, ticket: Ticket) -> None:
        """A request has left the queue."""
        self._queue.observe(ticket.queued)

    def first_token(self, ticket: Ticket) -> None:
        """Its prompt was read."""
        assert ticket.ttft is not None
        self._first.observe(ticket.ttft)
        self._prefill.observe(ticket.ttft - ticket.queued)
        self._prompt_tokens.inc(ticket.demand.prompt)

    def produced(self, tokens: int, seconds: float | None) -> None:
        """Tokens came, `seconds` after those before them; None for the first. Those that come together count each."""
        self._generation_tokens.inc(tokens)
        if seconds is not None:
            for _ in range(tokens):
                self._between.observe(seconds / tokens)

    def finished(self, ticket: Ticket) -> None:
        """A request ended."""
        reason = ticket.finish if ticket.finish in REASONS else "abort"
        self._success.labels(self._model, reason).inc()
        self._whole.observe(ticket.ended - ticket.arrived)
        if ticket.ttft is not None:
            self._decode.observe(ticket.ended - ticket.arrived - ticket.ttft)
        self._prompts.observe(ticket.demand.prompt)
        self._outputs.observe(ticket.tokens)

    # ── What others tell ────────────────────────────────────────────────────

    def answered(self, status: int) -> None:
        """A response of any route has ended."""
        self._responses.labels(self._model, str(status)).inc()

    def watch(
        self,
        snapshot: Callable[[], Snapshot],
        stats: Callable[[], Mapping[str, Any]] = dict,
        restarts: Callable[[], int] = lambda: 0,
        memory: Callable[[], int | None] = lambda: None,
        lines_dropped: Callable[[], int] = lambda: 0,
        engines: Callable[[], tuple[int, int]] = lambda: (1, 1),
    ) -> None:
        """Read these whenever the metrics are asked for: the state of admission; the engine's `stats` (`cache_usage`,
        0 … 1, where it tells it); how often it was restarted; its resident memory in bytes; log lines lost; how many
        engines there are, and how many of them are ready."""
        self.registry.register(_Watched(self._model, snapshot, stats, restarts, memory, lines_dropped, engines))

    def exposition(self) -> tuple[bytes, str]:
        """Everything in Prometheus's text format 0.0.4, and its content type."""
        return generate_latest(_Shown(self.registry, self._aliases)), CONTENT_TYPE_PLAIN_0_0_4

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The metrics as an ASGI application of their own, whatever the path."""
        body, kind = self.exposition()
        await Response(body, media_type=kind)(scope, receive, send)


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    """GET /metrics."""

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        body, kind = metrics.exposition()
        return Response(body, media_type=kind)


class _Watched:
    """A collector of what others know."""

    def __init__(
        self,
        model: str,
        snapshot: Callable[[], Snapshot],
        stats: Callable[[], Mapping[str, Any]],
        restarts: Callable[[], int],
        memory: Callable[[], int | None],
        lines_dropped: Callable[[], int],
        engines: Callable[[], tuple[int, int]],
    ) -> None:
        self._model, self._snapshot, self._stats = model, snapshot, stats
        self._restarts, self._memory, self._lines_dropped, self._engines = restarts, memory, lines_dropped, engines

    def collect(self) -> Iterator[Metric]:
        """All of it now."""
        now, usage, memory = self._snapshot(), self._stats().get("cache_usage"), self._memory()
        engines, ready = self._engines()
        yield self._gauge("num_requests_running", "Requests in the engine.", now.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", now.waiting)
        yield self._by_key(now.waiting_by_key)
        yield self._gauge("num_sequences_running", "Sequences in the engine; n of a request makes several.",
                          now.sequences)  # fmt: skip
        yield self._gauge("kv_cache_usage_perc", "KV cache in use, 1 = all; NaN: the engine does not tell.",
                          math.nan if usage is None else usage)  # fmt: skip
        yield self._gauge("kv_blocks", "Blocks of the KV caches of all engines that are ready.", now.blocks)
        yield self._gauge("kv_blocks_reserved", "Blocks that running requests may need at most.", now.blocks_used)
        yield self._gauge("prefill_tokens_per_second", "Reading speed of a request, as measured.", now.prefill_speed)
        yield self._gauge("decode_tokens_per_second", "Writing speed of a sequence, as measured.", now.decode_speed)
        yield self._gauge("engine_memory_bytes", "Resident memory of the engine processes; NaN while there are none.",
                          math.nan if memory is None else memory)  # fmt: skip
        yield self._gauge("engines", "Engines that are served with.", engines)
        yield self._gauge("engines_ready", "Those that take requests now.", ready)
        yield self._count("engine_restarts", "Engine processes that had to be replaced.", self._restarts())
        yield self._count("log_lines_dropped", "Log lines that could not be written.", self._lines_dropped())

    def _gauge(self, name: str, says: str, value: float) -> Metric:
        found = GaugeMetricFamily(OURS + name, says, labels=["model_name"])
        found.add_metric([self._model], value)
        return found

    def _count(self, name: str, says: str, value: float) -> Metric:
        found = CounterMetricFamily(OURS + name, says, labels=["model_name"])
        found.add_metric([self._model], value)
        return found

    def _by_key(self, waiting: dict[str, int]) -> Metric:
        found = GaugeMetricFamily(f"{OURS}num_requests_waiting_by_key", "Requests in the queue, by the key's id.",
                                  labels=["model_name", "key"])  # fmt: skip
        for key, count in waiting.items():
            found.add_metric([self._model, key], count)
        return found


class _Shown:
    """What a registry collects, without the times of creation that no dashboard reads, and under vLLM's names again
    when these are wanted."""

    def __init__(self, registry: CollectorRegistry, aliases: bool) -> None:
        self._registry, self._aliases = registry, aliases

    def collect(self) -> Iterable[Metric]:
        """Every family."""
        for family in self._registry.collect():
            samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield _family(family, family.name, samples)
            if self._aliases and family.name.removeprefix(OURS) in ALIASED:
                name = family.name.replace(OURS, THEIRS)
                yield _family(family, name, [_renamed(sample, name) for sample in samples])


def _family(like: Metric, name: str, samples: list[Sample]) -> Metric:
    made = Metric(name, like.documentation, like.type)
    made.samples = samples
    return made


def _renamed(sample: Sample, family: str) -> Sample:
    labels = sample.labels if family == WITHOUT_ENGINE else {**sample.labels, "engine": "0"}
    return sample._replace(name=sample.name.replace(OURS, THEIRS), labels=labels)


@asynccontextmanager
async def own_port(app: ASGIApp, bound: socket.socket, **options: Any) -> AsyncIterator[None]:
    """Serve `app` on `bound` in the running event loop for as long as this is open: /metrics on a port of its own,
    which a firewall can tell from the API's. Whoever opens it puts the same doorkeeper before `app` as before the API,
    and gives uvicorn the same `options`: limits and TLS.
    """

    class Second(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals belong to the first server."""
            yield

    config = uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=1, **options)
    server = Second(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
