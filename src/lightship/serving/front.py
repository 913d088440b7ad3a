"""What stands between the network and any engine: keys, limits, admission, metrics, and a line for each request."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from lightship.report import Report
from lightship.serving import errors
from lightship.serving.admission import Admission
from lightship.serving.app import Served
from lightship.serving.auth import Doorkeeper, guard
from lightship.serving.draining import Door, Turnstile
from lightship.serving.journal import Journal, Sink, journal_to
from lightship.serving.keys import KeyRing
from lightship.serving.limits import HeadLimit
from lightship.serving.metrics import Metrics, add_metrics, own_port
from lightship.serving.protocol import DoorLoop, protocol_with
from lightship.serving.settings import ServeSettings
from lightship.serving.ticket import Limits

UNBATCHED = 8  # sequences in an engine that computes one at a time: a request may ask for as many


class Front:
    """Made for one engine. `admission` is what its routes ask; `stand_before` puts the rest before the app."""

    def __init__(
        self, settings: ServeSettings, keys: KeyRing, name: str, context: int, capacity: Limits, report: Report
    ) -> None:
        """`capacity` holds until the engine says more, see `loaded`."""
        self.door = Door()
        self._settings, self._keys = settings, keys
        self._metrics = Metrics(name, context, settings.vllm_names)
        limits = replace(capacity, max_queue=settings.max_queue, first_token_deadline=settings.first_token_deadline,
                         total_deadline=settings.total_deadline)  # fmt: skip
        prefill, decode = (metric.value if (metric := report.get(known)) else None for known in ("prefill", "decode"))
        self.admission = Admission(limits, prefill, decode, self._metrics)
        self._sink: Sink | None = None
        self._logger = logging.Logger("lightship.journal", logging.CRITICAL)  # silent
        if settings.log is not None:
            self._logger, self._sink = journal_to(settings.log)

    def loaded(self, stats: Mapping[str, Any]) -> None:
        """Take from the engine what only it knows: the size of its KV cache, and whether it computes one at a time.
        Then few are let in: the others wait where turns are fair."""
        if stats.get("batching") == "none":
            self.admission.limits = replace(self.admission.limits, max_concurrent=UNBATCHED)
        if (blocks := stats.get("blocks")) is not None:
            self.admission.limits = replace(self.admission.limits, blocks=blocks, block_tokens=stats["block_tokens"])

    def stand_before(self, app: FastAPI, engine: Served) -> ASGIApp:
        """`app` with everything before it. Outermost is the line for each request, around what answers unexpected
        errors too, so that every answer has its id."""
        self._metrics.watch(self.admission.snapshot, lambda: engine.stats, lambda: engine.restarts, engine.resident,
                            self._lost)  # fmt: skip
        if self._settings.metrics_port is None:
            add_metrics(app, self._metrics)
        app.add_middleware(Turnstile, door=self.door)
        guard(app, self._keys, self._settings.limits, self._local)
        errors.document(app, keyed=self._keys.locked)
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
