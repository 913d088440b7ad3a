"""A measurement from end to end: ask the server what it is, make the prompts, run a loop, compute the figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lightship.bench.client import Asked, Seen, ask, message
from lightship.bench.figures import Figures, Limit, figures
from lightship.bench.loop import TIMEOUT, Nobody, Run, Watch, closed_loop, open_loop
from lightship.bench.prompts import Length, Manner, Prose, Source, Synthetic
from lightship.bench.schedule import poisson
from lightship.bench.sweep import BISECT, HALVINGS, SHARES, Step, Sweep, climb
from lightship.bench.trace import Round, Trace, needs_ids, read_trace
from lightship.bench.wire import Door, Place
from lightship.errors import EngineError, LightshipError, UsageError

PROBE_WORDS = 64
OPEN_WARMUP = 3  # requests
STEPS = 5  # a step of a sweep lasts at least so many times the longest limit
Keep = Callable[[Run], None]
BROKEN_OFF = ("It was broken off: requests that ran then are in no figure, and those are the long ones more often than "
              "not.")  # fmt: skip
AGAIN = "Lines of the trace were asked again: a server that remembers prompts looks faster than it is. Give more lines."
OPTIONAL = {"ignore_eos": "ignore_eos", "stream_options": "usage"}  # field of a request: of `Manner`


@dataclass(frozen=True)
class Settings:
    """What to measure. `rate` (requests a second, open loop) or `clients` (closed loop); `inputs`, `outputs`, `prefix`
    in tokens, the prefix before the inputs; `seconds` and `requests` end a run, whichever comes first."""

    url: str
    model: str | None = None
    key: str | None = None
    chat: bool = False
    inputs: int = 200
    outputs: int = 64
    prefix: int = 0
    tokenizer: Path | None = None
    trace: Path | None = None
    rate: float | None = None
    clients: int | None = None
    requests: int | None = None
    seconds: float | None = None
    warmup: int | None = None
    seed: int = 0
    timeout: float = TIMEOUT
    keep_alive: bool = True


@dataclass(frozen=True)
class Server:
    """What was found out about a server before anything was measured. `notes` are for people."""

    manner: Manner
    length: Length | None
    notes: tuple[str, ...]


class Session:
    """Measurements of one server; each draws other prompts, so that none finds its own in a prefix cache.

    `async with` it: opening looks at the server. Raises `EngineError` where there is none, `RequestError` for what it
    refuses, `UsageError` for settings that do not go together.
    """

    def __init__(self, settings: Settings, watch: Watch | None = None, sweep: bool = False) -> None:
        """`sweep`: it measures at several rates, for which a trace gives its lines without their times."""
        if settings.rate is not None and settings.clients is not None:
            raise UsageError("a rate and clients: open or closed loop?", hint="give --rate or --clients")
        self.settings = settings
        self.watch = watch or Nobody()
        self.door = Door(Place.of(settings.url), settings.keep_alive, settings.key)
        self.trace = None if settings.trace is None else read_trace(settings.trace)
        self.sweep = sweep
        if self.trace is not None and self.trace.timed and not sweep and (settings.rate or settings.clients):
            raise UsageError("the trace says when requests are due", hint='leave out --rate and --clients, or its "at"')
        if self.trace is not None and settings.chat and needs_ids(self.trace.lines):
            raise UsageError("the trace has prompts of token ids, which --chat cannot send")
        if settings.tokenizer is not None and settings.chat:
            raise UsageError("--tokenizer makes prompts of token ids, which --chat cannot send")
        self._prose = self._load_prose()
        self._round = self._used = 0  # runs; lines of the trace, in a sweep
        self.cut: Run | None = None  # what was measured of a run that was cancelled
        self.server = Server(Manner(), None, ())

    def _load_prose(self) -> Prose:
        if self.trace is not None:
            return Prose(())
        tokenizer = self.settings.tokenizer
        return Prose.of_words() if tokenizer is None else Prose.of_ids(tokenizer)

    async def __aenter__(self) -> Session:
        try:
            self.server = await self._look()
        except BaseException:
            self.door.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.door.close()

    # ── What the server is ──────────────────────────────────────────────────

    async def _look(self) -> Server:
        manner = Manner(self.settings.model or await self._model(), self.settings.chat)
        notes: list[str] = []
        content: Any = self._words(PROBE_WORDS) if self.trace is None else "Hello"
        if self.trace is not None:  # none of its own prompts: that one would then be in the prefix cache
            messages = isinstance(self.trace.lines[0].content, list) and not needs_ids(self.trace.lines[:1])
            content = [{"role": "user", "content": content}] if messages else content
        manner, few = await self._probe(manner, content, notes)
        length = None
        if self.trace is None and self.settings.tokenizer is None:
            length = await self._length(manner, few, notes)
        return Server(manner, length, tuple(notes))

    def _words(self, count: int) -> Any:
        """Words from all over the text, whose mean length is that of the text."""
        units = self._prose.units
        kept = [units[place * len(units) // count] for place in range(count)]
        return kept if isinstance(kept[0], int) else " ".join(kept)

    async def _model(self) -> str | None:
        """The first model that the server lists; None where it has no list."""
        place = self.door.place
        try:
            answer = await self.door.send(self.door.request("GET", "/v1/models"))
            try:
                body = await answer.read()
            finally:
                answer.close()
        except OSError as error:
            raise EngineError(f"no answer from {place.name}: {error}", hint="is the server running there?") from error
        except (EOFError, ValueError) as error:
            raise EngineError(f"{place.name} does not speak HTTP: {error}",
                              hint="http:// or https://, and the right port?") from error  # fmt: skip
        if answer.status in (401, 403):
            raise refused(answer.status, message(body, answer.status))
        try:
            return str(json.loads(body)["data"][0]["id"]) if answer.status == 200 else None
        except (ValueError, LookupError, TypeError):
            return None

    async def _probe(self, manner: Manner, content: Any, notes: list[str]) -> tuple[Manner, Seen]:
        """A first request; optional fields that the server refuses by name are left out from then on."""
        for _ in range(len(OPTIONAL) + 1):
            seen = await self._once(manner.asked(0, content, 2, self.trace is None))
            unknown = next((field for field, own in OPTIONAL.items()
                            if field in (seen.reason or "") and getattr(manner, own)), None)  # fmt: skip
            if seen.status not in (400, 422) or unknown is None:
                break
            if unknown == "stream_options":
                manner = replace(manner, usage=False)
            else:
                manner = replace(manner, ignore_eos=False)
                notes.append("The server knows no ignore_eos: answers may end before the length that is asked for.")
        if seen.status is None:
            raise EngineError(f"no answer from {self.door.place.name}: {seen.reason}", hint="is the server running?")
        if seen.outcome in ("failed", "refused", "broken", "timeout"):
            raise refused(seen.status, seen.reason or "")
        if seen.counted == "pieces":
            notes.append("The server tells no usage: tokens are the pieces that came, which may hold several.")
        return manner, seen

    async def _once(self, asked: Asked) -> Seen:
        return await ask(self.door, asked, lambda: 0.0, 0.0, self.settings.timeout)

    async def _length(self, manner: Manner, few: Seen, notes: list[str]) -> Length:
        """Tokens a word, by the server's own count of two prompts: what a template adds is in both."""
        if few.prompt_tokens is None:
            return self._guess(notes)
        whole = self.settings.inputs + self.settings.prefix
        words = max(2 * PROBE_WORDS, PROBE_WORDS * whole // max(few.prompt_tokens, 1))
        many = await self._once(manner.asked(0, self._words(words), 1, True))
        if many.prompt_tokens is None:
            raise refused(many.status, many.reason or many.outcome)
        if many.prompt_tokens <= few.prompt_tokens:
            return self._guess(notes)
        return Length.fitted((PROBE_WORDS, few.prompt_tokens), (words, many.prompt_tokens))

    def _guess(self, notes: list[str]) -> Length:
        notes.append("The server does not count prompts: 4 tokens are taken for 3 words.")
        return Length(4 / 3)

    # ── Measuring ───────────────────────────────────────────────────────────

    def _source(self) -> Source:
        manner, settings = self.server.manner, self.settings
        if isinstance(self.trace, Trace):
            trace = replace(self.trace, manner=manner)
            return Round(trace, self._used) if self.sweep else trace
        length, prefix = settings.inputs, settings.prefix
        if (fit := self.server.length) is not None:
            prefix = max(1, round(prefix / fit.each)) if prefix else 0
            length = max(1, fit.words(settings.inputs + settings.prefix) - prefix)
        return Synthetic(manner, self._prose, length, settings.outputs, prefix, settings.seed + 1000 * self._round)

    @property
    def repeats(self) -> bool:
        """Whether lines of the trace were asked more than once."""
        return self.trace is not None and self._used > self.trace.count

    async def run(self, rate: float | None) -> Run:
        """One measurement: open loop at `rate` or by the trace's times, closed loop where there is neither."""
        source = self._source()
        try:
            return await self._measured(rate, source)
        finally:
            self._used += source.used if isinstance(source, Round) else 0

    def _cut(self, run: Run) -> None:
        self.cut = run

    async def _measured(self, rate: float | None, source: Source) -> Run:
        settings = self.settings
        requests, seconds = settings.requests, settings.seconds
        self._round += 1
        if isinstance(source, Trace) and source.timed:
            schedule = source.schedule(settings.warmup or 0, requests, seconds)
            return await open_loop(self.door, source, schedule, self.watch, settings.timeout, self._cut)
        if rate is not None:
            warmup = settings.warmup if settings.warmup is not None else (0 if self.trace else OPEN_WARMUP)
            most = None if source.count is None else source.count - warmup
            if most is not None and most < 1:
                raise UsageError(f"the trace has {source.count} requests, and the first {warmup} are not measured",
                                 hint="give a smaller --warmup")  # fmt: skip
            ends = [each for each in (requests, most) if each is not None]
            schedule = poisson(rate, settings.seed, warmup, min(ends, default=None), seconds, one=self.sweep)
            return await open_loop(self.door, source, schedule, self.watch, settings.timeout, self._cut)
        clients = settings.clients or 1
        warmup = settings.warmup if settings.warmup is not None else (0 if self.trace else clients)
        return await closed_loop(self.door, source, clients, requests, seconds, warmup, self.watch, settings.timeout,
                                 self._cut)  # fmt: skip


async def measure(
    settings: Settings,
    limits: Sequence[Limit] = (),
    watch: Watch | None = None,
    keep: Keep | None = None,
    cut: Callable[[Figures], None] | None = None,
) -> Figures:
    """The one measurement that the settings describe; `keep` gets its requests. When it is cancelled `keep` and `cut`
    get what was measured by then, if anything was."""
    keep = keep or (lambda run: None)
    async with Session(settings, watch) as session:
        try:
            run = await session.run(settings.rate)
        except asyncio.CancelledError:
            if session.cut is not None and session.cut.seen:
                keep(session.cut)
                if cut is not None:
                    cut(figures(session.cut, limits, (*session.server.notes, BROKEN_OFF)))
            raise
        keep(run)
        return figures(run, limits, session.server.notes)


async def find_knee(
    settings: Settings,
    limits: Sequence[Limit],
    share: float,
    watch: Watch | None = None,
    keep: Keep | None = None,
    cut: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Measure the capacity in a closed loop, then rates around it until fewer than `share` of the requests are within
    all `limits`; `keep` gets the requests of each. A trace's lines are asked in their order, over and over. When it is
    cancelled `keep` gets what was measured of the rate that was cut off, and `cut` the rates before it."""
    keep = keep or (lambda run: None)
    async with Session(settings, watch, sweep=True) as session:
        notes, steps = list(session.server.notes), list[Step]()

        async def at(rate: float | None) -> Figures:
            run = await session.run(rate)
            keep(run)
            return figures(run, limits, (*notes, AGAIN) if session.repeats else tuple(notes))

        if settings.seconds is not None and any(settings.seconds < STEPS * limit.seconds for limit in limits):
            notes.append(f"Steps of {settings.seconds:g} s are short beside the limits: a queue may not have grown "
                         f"past them yet. Give --seconds of {STEPS} times the limit.")  # fmt: skip
        try:
            capacity = (await at(None)).requests_per_second
            if not capacity:
                raise EngineError("the server answered no request of the closed loop",
                                  hint="measure it without --sweep")  # fmt: skip
            return await climb(at, [capacity * each for each in SHARES], share, BISECT, HALVINGS, steps.append)
        except asyncio.CancelledError:
            if session.cut is not None and session.cut.seen:
                keep(session.cut)
            if cut is not None and steps:
                cut(Sweep(tuple(steps), share))
            raise


def refused(status: int | None, reason: str) -> LightshipError:
    """The error for a server that does not do what is asked."""
    if status in (401, 403):
        return EngineError(f"the server wants a key ({status}): {reason}",
                           hint="put it into $LIGHTSHIP_KEY, or name its variable with --api-key-env")  # fmt: skip
    if status == 404:
        return EngineError(f"the server has no such model or route: {reason}", hint="see --model and --chat")
    return EngineError(f"the server did not answer the first request: {reason}")
