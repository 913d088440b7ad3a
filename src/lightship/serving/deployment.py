"""A bundle as it is served: its engine, what lets requests in, and its routes. A server has one, and while it changes
to another bundle two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi import FastAPI

from lightship.bundle import Bundle
from lightship.errors import EngineDied
from lightship.report import Report
from lightship.serving import encoder, golden, openai
from lightship.serving.admission import Admission
from lightship.serving.app import Closes, Served, create_routes
from lightship.serving.batcher import Batcher
from lightship.serving.encoder import ServedEncoder
from lightship.serving.fleet import Fleet, open_engine
from lightship.serving.front import Front
from lightship.serving.golden import Found
from lightship.serving.grammar import Grammars
from lightship.serving.model import ServedModel
from lightship.serving.models import Card
from lightship.serving.placement import Place, beside
from lightship.serving.scoring import Scoring
from lightship.serving.settings import ServeSettings
from lightship.serving.supervisor import Supervisor
from lightship.serving.ticket import Limits, Seats
from lightship.serving.tuned import drafted, facts, placed, with_tuned

log = logging.getLogger("lightship.serving")
UNKNOWN = 10**9  # blocks of a KV cache whose engine does not tell its size


class Kind(Protocol):
    """What differs between models that generate and encoders."""

    @property
    def bundle(self) -> Bundle: ...
    @property
    def report(self) -> Report:
        """What was measured of the target that serves when the bundle was made."""
        ...

    @property
    def engine(self) -> Served: ...
    @property
    def model(self) -> Card: ...
    @property
    def capacity(self) -> Limits:
        """Until the engine says more."""
        ...

    @property
    def seats(self) -> Seats | None:
        """Where there are several engines."""
        ...

    @property
    def beside(self) -> Sequence[Closes]:
        """What is closed after the engine."""
        ...

    def add_routes(self, app: FastAPI, admission: Admission) -> None:
        """The routes of its API."""
        ...

    async def warm(self) -> None:
        """Let the loaded engine answer for the first time."""
        ...

    async def replay(self) -> Found:
        """Compare what the loaded engine says with the golden rows."""
        ...


@dataclass(frozen=True)
class Decoder:
    """A model that generates, on one engine or several."""

    bundle: Bundle
    report: Report
    engine: Supervisor | Fleet
    model: ServedModel
    capacity: Limits
    grammars: Grammars
    scoring: Scoring | None

    @staticmethod
    def of(bundle: Bundle, engine: Supervisor | Fleet, settings: ServeSettings, name: str) -> Decoder:
        """Read what the API needs; `engine` was told to load."""
        target = settings.target or bundle.targets[0]
        folder = bundle.target_folder(target)
        used = settings.draft if settings.engine.draft is not None else None
        named = replace(settings.engine, draft=used.digest if used else None)  # wherever it lies
        model = ServedModel.load(name, bundle.digest, folder, named)
        context = min(model.context, settings.max_context or model.context)
        model = replace(model, context=context, facts=facts(bundle, settings))
        place = beside([each.place for each in _engines(engine)])
        scoring = Scoring(target, folder, settings.engine, place) if settings.scoring else None
        capacity = Limits(blocks=UNKNOWN, max_concurrent=settings.max_concurrent)
        report, grammars = bundle.measured(target), Grammars(target, folder, place.cores)
        return Decoder(bundle, report, engine, model, capacity, grammars, scoring)

    @property
    def seats(self) -> Seats | None:
        """The fleet, where it is one."""
        return self.engine if isinstance(self.engine, Fleet) else None

    @property
    def beside(self) -> Sequence[Closes]:
        """The processes for grammars and scores."""
        return [self.grammars, *([self.scoring] if self.scoring else [])]

    def add_routes(self, app: FastAPI, admission: Admission) -> None:
        """See `openai`."""
        openai.add_routes(app, self.engine, self.model, lambda: self.engine.stats.get("batching"), self.grammars,
                          self.scoring, admission)  # fmt: skip

    @property
    def _engines(self) -> Sequence[Supervisor]:
        return _engines(self.engine)

    async def warm(self) -> None:
        """See `golden.warmed`."""
        await golden.warmed(self.bundle, self.model, self._engines)

    async def replay(self) -> Found:
        """See `golden.replayed`."""
        return await golden.replayed(self.bundle, self._engines)


def _engines(engine: Supervisor | Fleet) -> Sequence[Supervisor]:
    return engine.engines if isinstance(engine, Fleet) else [engine]


@dataclass(frozen=True)
class EncoderKind:
    """An encoder runs in this process: it holds no lock of the interpreter while it computes."""

    bundle: Bundle
    report: Report
    engine: Batcher
    model: ServedEncoder
    seats: None = None
    beside: Sequence[Closes] = ()

    @staticmethod
    def of(bundle: Bundle, settings: ServeSettings, name: str) -> EncoderKind:
        """Read what the API needs."""
        target = settings.target or bundle.targets[0]
        batcher = Batcher(target, bundle.target_folder(target), settings.engine)
        model = ServedEncoder(name, bundle.digest, batcher.encoder, facts(bundle, settings))
        return EncoderKind(bundle, bundle.measured(target), batcher, model)

    @property
    def capacity(self) -> Limits:
        """See `encoder.capacity`."""
        return encoder.capacity(self.model.context)

    def add_routes(self, app: FastAPI, admission: Admission) -> None:
        """See `encoder`."""
        encoder.add_routes(app, self.engine, self.model, admission)

    async def warm(self) -> None:
        """The replay does."""

    async def replay(self) -> Found:
        """See `golden.encoded`."""
        return await golden.encoded(self.bundle, self.engine)


@dataclass(eq=False)
class Deployment:
    """A bundle that is served, is about to be, or has been. `inside`: requests that it has now."""

    kind: Kind
    admission: Admission
    routes: FastAPI
    inside: int = 0

    @property
    def engine(self) -> Served:
        """What computes."""
        return self.kind.engine

    @property
    def bundle(self) -> Bundle:
        """What it serves."""
        return self.kind.bundle

    @property
    def folder(self) -> str:
        """Where the bundle lies."""
        return str(self.bundle.folder.absolute())

    def described(self) -> dict[str, Any]:
        """For /admin/deployments."""
        return {"bundle": self.folder, "digest": self.bundle.digest, "ready": self.engine.ready,
                "requests": self.inside, "restarts": self.engine.restarts}  # fmt: skip

    async def close(self) -> None:
        """End its processes, whatever they do, and tell those who wait for them."""
        self.admission.end(EngineDied(self.engine.failure or "the engine was closed"))
        await self.engine.close()
        for each in self.kind.beside:
            await each.close()


@dataclass
class Maker:
    """Makes the deployments of one server: what they have in common. `name` is the model's in the API, `served` the
    slot they come into; `also` adds the routes that are no model's."""

    settings: ServeSettings
    places: Sequence[Place]
    name: str
    front: Front
    shell: FastAPI
    served: Served
    also: Callable[[FastAPI], None] = lambda app: None

    @property
    def defaults(self) -> ServeSettings:
        """The settings for any bundle where nothing is tuned."""
        return placed(drafted(self.settings), self.places)

    def chosen(self, bundle: Bundle) -> ServeSettings:
        """The settings for `bundle`, see `with_tuned`."""
        return with_tuned(bundle.folder, self.settings, log.info, self.places)

    def engine(self, target: str, chosen: ServeSettings) -> Supervisor | Fleet:
        """What will generate with `target`; nothing is started yet."""
        return open_engine(target, chosen.engine, chosen.cared, self.places)

    def kind(self, bundle: Bundle, engine: Supervisor | Fleet | None, chosen: ServeSettings) -> Kind:
        """See `kind_of`."""
        return kind_of(bundle, engine, chosen, self.name)

    def deployment(self, kind: Kind) -> Deployment:
        """With doors and routes of its own; its engine need not be loaded."""
        admission = self.front.admission(kind.capacity, kind.report, kind.seats)

        def add_routes(app: FastAPI) -> None:
            kind.add_routes(app, admission)
            self.also(app)
            self.front.furnish(app)

        return Deployment(kind, admission, create_routes(self.shell, self.served, add_routes))


def kind_of(bundle: Bundle, engine: Supervisor | Fleet | None, settings: ServeSettings, name: str) -> Kind:
    """A decoder with `engine`, which was told to load, or an encoder without one."""
    if engine is None:
        return EncoderKind.of(bundle, settings, name)
    return Decoder.of(bundle, engine, settings, name)
