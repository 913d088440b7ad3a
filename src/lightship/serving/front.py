"""What stands between the network and any engine: keys, limits, admission, metrics, and a line for each request."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from lightship.report import Report
from lightship.serving import errors
from lightship.serving.admission import Admission, Snapshot
from lightship.serving.app import Served
from lightship.serving.auth import Doorkeeper, guard
from lightship.serving.draining import Door, Turnstile
from lightship.serving.journal import Journal, Sink, journal_to
from lightship.serving.keys import KeyRing
from lightship.serving.limits import HeadLimit
from lightship.serving.metrics import Metrics, add_metrics, own_port
from lightship.serving.protocol import DoorLoop, protocol_with
from lightship.serving.rates import KeyRates
from lightship.serving.settings import ServeSettings
from lightship.serving.ticket import Limits, Seats

UNBATCHED = 8  # sequences in an engine that computes one at a time: a request may ask for as many


def learn(admission: Admission, stats: Mapping[str, Any]) -> None:
    """Take from a loaded engine what only it knows: the size of its KV cache, and whether it computes one at a time.
    Then few are let in: the others wait where turns are fair."""
    limits = admission.limits
    if stats.get("batching") == "none":
        limits = replace(limits, max_concurrent=UNBATCHED)
    if (blocks := stats.get("blocks")) is not None:
        limits = replace(limits, blocks=blocks, block_tokens=stats["block_tokens"])
    admission.begin(limits)


class Front:
    """Made for one server. `admission` is what the routes of a deployment ask; `furnish` and `stand_before` put the
    rest around them."""

    def __init__(self, settings: ServeSettings, keys: KeyRing, name: str, context: int) -> None:
        """`name` and `context` (tokens) of the model, for the metrics."""
        self.door = Door()
        self._settings, self._keys = settings, keys
        self._metrics = Metrics(name, context, settings.vllm_names)
        self._rates = KeyRates(time.monotonic)
        self._sink: Sink | None = None
        self._logger = logging.Logger("lightship.journal", logging.CRITICAL)  # silent
        if settings.log is not None:
            self._logger, self._sink = journal_to(settings.log)

    def admission(self, capacity: Limits, report: Report, seats: Seats | None = None) -> Admission:
        """For a new deployment, which lets nobody in before its engine is there, see `learn`. What keys have used is
        known to all."""
        settings = self._settings
        limits = replace(capacity, max_queue=settings.max_queue, first_token_deadline=settings.first_token_deadline,
                         total_deadline=settings.total_deadline)  # fmt: skip
        prefill, decode = (metric.value if (metric := report.get(known)) else None for known in ("prefill", "decode"))
        return Admission(limits, prefill, decode, self._metrics, seats=seats, rates=self._rates, begun=False)

    def furnish(self, routes: FastAPI) -> None:
        """Put into an app of routes what does not depend on the model: /metrics, and what the document says of
        errors."""
        if self._settings.metrics_port is None:
            add_metrics(routes, self._metrics)
        errors.document(routes, keyed=self._keys.locked)

    def stand_before(
        self,
        app: FastAPI,
        engine: Served,
        snapshot: Callable[[], Snapshot],
        engines: Callable[[], tuple[int, int]] = lambda: (1, 1),
    ) -> ASGIApp:
        """`app` with everything before it. Outermost is the line for each request, around what answers unexpected
        errors too, so that every answer has its id."""
        self._metrics.watch(snapshot, lambda: engine.stats, lambda: engine.restarts, engine.resident, self._lost,
                            engines)  # fmt: skip
        app.add_middleware(Turnstile, door=self.door)
        guard(app, self._keys, self._settings.limits, self._local)
        return Journal(app, self._logger, self._settings.log_prompts, self._metrics.answered)

    @property
    def listening(self) -> dict[str, Any]:
        """What uvicorn is told for every port of the server: limits, TLS, and that nothing is guessed or given away."""
        settings = self._settings
        loop = f"{DoorLoop.__module__}:{DoorLoop.__name__}"
        return {"http": protocol_with(settings.limits), "loop": loop, "ws": "none", "log_level": "error",
                "access_log": False, "server_header": False, "proxy_headers": False,
                "ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}  # fmt: skip

    def _lost(self) -> int:
        return 0 if self._sink is None else self._sink.dropped

    @property
    def _local(self) -> bool:
        return not self._settings.behind_proxy

    @asynccontextmanager
    async def open(self, bound: socket.socket | None) -> AsyncIterator[None]:
        """Serve the metrics on `bound`, where they have a port of their own, and stop the log at the end."""
        try:
            if bound is None:
                yield
            else:
                guarded = HeadLimit(Doorkeeper(self._metrics, self._keys, self._local))
                async with own_port(guarded, bound, **self.listening):
                    yield
        finally:
            if self._sink is not None:
                self._sink.stop()
