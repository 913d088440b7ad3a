"""An encoder's inputs of all requests in one queue: those of like length are run together."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.encoder import Encoder, Row
from lightship.engine import EncoderEngine, EngineSettings
from lightship.errors import EngineDied, EngineError, LightshipError
from lightship.find import find

log = logging.getLogger("lightship.serving")
Floats = npt.NDArray[np.float32]
BATCH = 32  # rows that are run together at most
STOPPING = EngineDied("the server is stopping")


@dataclass(order=True)
class _Waiting:
    """A row in the queue. Of a request's rows the first `BATCH` are its first turn, the next its second, and so on: a
    request of thousands takes turns with those that come after it."""

    turn: int
    number: int
    row: Row = field(compare=False)
    found: asyncio.Future[Floats] = field(compare=False)


def bucket(length: int) -> int:
    """Rows of one bucket differ by at most a quarter in length; up to 16 tokens they are one, since a run of so few
    costs about the same."""
    last = max(length, 16) - 1
    octave = last.bit_length() - 3
    return 4 * octave + (last >> octave)


class Batcher:
    """The engine of an encoder in a thread of its own, which lets others work while it computes.

    Nothing waits for a batch to fill: while one is computed the next gathers. It is made of the row that is first in
    turn and others of its length, `bucket`; so what costs is padded little, and no row is passed over for ever.
    """

    failure: str | None = None  # an error is the batch's own: the engine lives on
    live = True
    restarts = 0
    stats: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, target: str, folder: Path, settings: EngineSettings) -> None:
        self.encoder = Encoder.load(folder)
        self._open: Callable[[], EncoderEngine] = lambda: find("targets", target).open_encoder(folder, settings)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._engine: EncoderEngine | None = None
        self._waiting: dict[int, list[_Waiting]] = {}  # bucket → heap
        self._turn, self._number = 0, 0
        self._filled = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    def resident(self) -> None:
        """It has no process of its own."""

    async def start(self) -> None:
        """Load the model, and begin."""
        self._engine = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        self._working = asyncio.create_task(self._work())

    async def run(self, rows: Sequence[Row]) -> list[Floats]:
        """What each row means (`Encoder.meaning`), padding left out. Cancelled, its rows leave the queue."""
        if self._engine is None:
            raise EngineDied("the model is not loaded")
        loop, waiting = asyncio.get_running_loop(), []
        for place, number in enumerate(sorted(range(len(rows)), key=lambda number: len(rows[number]))):
            self._number += 1
            turn = self._turn + place // BATCH
            waiting.append((number, _Waiting(turn, self._number, rows[number], loop.create_future())))
        for _, each in waiting:
            heapq.heappush(self._waiting.setdefault(bucket(len(each.row)), []), each)
        self._filled.set()
        found = await asyncio.gather(*(each.found for _, each in waiting))
        return [result for _, result in sorted(zip((number for number, _ in waiting), found, strict=True),
                                               key=lambda pair: pair[0])]  # fmt: skip

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            batch = self._next()
            if not batch:
                self._filled.clear()
                continue
            try:
                found = await loop.run_in_executor(self._thread, self._batch, [each.row for each in batch])
            except asyncio.CancelledError:
                self._end(batch, [STOPPING] * len(batch))
                raise
            except Exception as error:
                if not isinstance(error, LightshipError):
                    log.exception("the encoder failed")
                    error = EngineError("the model failed on this input")
                self._end(batch, [error] * len(batch))
            else:
                self._end(batch, found)

    def _next(self) -> list[_Waiting]:
        """The row that is first in turn, and more of its bucket; what was cancelled is dropped."""
        heaps = {size: heap for size, heap in self._waiting.items() if self._first(heap)}
        self._waiting = heaps
        if not heaps:
            return []
        heap = heaps[min(heaps, key=lambda size: heaps[size][0])]
        self._turn = heap[0].turn
        batch: list[_Waiting] = []
        while len(batch) < BATCH and self._first(heap):
            batch.append(heapq.heappop(heap))
        return batch

    @staticmethod
    def _first(heap: list[_Waiting]) -> bool:
        while heap and heap[0].found.done():
            heapq.heappop(heap)
        return bool(heap)

    @staticmethod
    def _end(batch: Sequence[_Waiting], results: Sequence[Floats | LightshipError]) -> None:
        for each, result in zip(batch, results, strict=True):
            if each.found.done():
                continue  # cancelled
            if isinstance(result, LightshipError):
                each.found.set_exception(result)
            else:
                each.found.set_result(result)

    def _batch(self, rows: list[Row]) -> list[Floats]:
        assert self._engine is not None
        batch = self.encoder.pad_rows(rows)
        meaning = self.encoder.meaning(self._engine.run(batch.ids, batch.mask, batch.types), batch.mask)
        return [each[:, : len(row)] if self.encoder.kind == "qa" else each
                for each, row in zip(meaning, rows, strict=True)]  # fmt: skip

    async def close(self) -> None:
        """Release the model, once its batch is done."""
        if self._working is not None:
            self._working.cancel()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        for heap in self._waiting.values():
            self._end(heap, [STOPPING] * len(heap))
