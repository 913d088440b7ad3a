"""Micro-batching of encoders, with a real tiny model behind it: what runs together and in what order, and faults."""

import asyncio
import threading

import numpy as np
import pytest

from lightship.encoder import Row
from lightship.engine import EngineSettings
from lightship.errors import EngineDied, EngineError
from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe
from lightship.serving.batcher import BATCH, Batcher, bucket
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    source = tiny_encoder(folder / "model", "BertModel").folder
    ship(Recipe(source=str(source), target="onnx", precision=Precision(name="fp32")), folder / "tiny")
    return folder / "tiny" / "targets" / "onnx"


class Watched:
    """The engine of a batcher, which notes the length of each row of each batch; `gate` holds it back."""

    def __init__(self, engine):
        self.engine, self.batches, self.gate, self.fails = engine, [], threading.Event(), False
        self.gate.set()

    def run(self, ids, mask, types):
        self.gate.wait(30)
        self.batches.append(mask.sum(1).tolist())
        if self.fails:
            raise RuntimeError("told to fail")
        return self.engine.run(ids, mask, types)

    def close(self):
        self.engine.close()


def run(folder, scene):
    """`scene(batcher, watched engine)` on an event loop of its own."""

    async def whole():
        batcher = Batcher("onnx", folder, EngineSettings())
        await batcher.start()
        batcher._engine = watched = Watched(batcher._engine)
        try:
            return await scene(batcher, watched)
        finally:
            watched.gate.set()
            await batcher.close()

    return asyncio.run(whole())


def row(length):
    return Row((2, *(5 + number % 40 for number in range(length - 2)), 3), (0,) * length)


async def begun(*work):
    """Tasks that have begun to wait."""
    tasks = [asyncio.create_task(each) for each in work]
    await asyncio.sleep(0.01)
    return tasks


def test_buckets_grow_by_a_quarter_at_most():
    sizes = {}
    for length in range(1, 5000):
        sizes.setdefault(bucket(length), []).append(length)
    assert sorted(sizes) == list(sizes) and len(sizes) < 50
    for lengths in sizes.values():
        assert max(lengths) <= 16 or max(lengths) <= 1.25 * min(lengths)


def test_requests_that_wait_run_together_by_length_and_give_what_they_give_alone(folder):
    lengths = [5, 100, 12, 98, 40, 9, 97, 38] * 4

    async def scene(batcher, watched):
        alone = [(await batcher.run([row(length)]))[0] for length in lengths]
        assert len(watched.batches) == len(lengths)
        watched.batches.clear()
        watched.gate.clear()
        first = await begun(batcher.run([row(20)]))  # occupies the engine while the others gather
        tasks = await begun(*(batcher.run([row(length)]) for length in lengths))
        watched.gate.set()
        together = await asyncio.gather(*first, *tasks)
        for (found,), expected in zip(together[1:], alone, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
        return watched.batches

    batches = run(folder, scene)
    assert sorted(map(len, batches)) == [1, 8, 12, 12]
    assert all(len({bucket(length) for length in batch}) == 1 for batch in batches)


def test_a_request_of_hundreds_takes_turns(folder):
    async def scene(batcher, watched):
        watched.gate.clear()
        (many,) = await begun(batcher.run([row(10)] * 10 * BATCH))
        (one,) = await begun(batcher.run([row(50)]))
        watched.gate.set()
        await one
        seen = len(watched.batches)
        assert not many.done()
        assert len(await many) == 10 * BATCH
        return seen, len(watched.batches)

    seen, total = run(folder, scene)
    assert seen <= 3 and total == 11


def test_who_leaves_is_not_computed(folder):
    async def scene(batcher, watched):
        watched.gate.clear()
        (first,) = await begun(batcher.run([row(20)]))
        gone = await begun(*(batcher.run([row(30), row(60)]) for _ in range(5)))
        (stays,) = await begun(batcher.run([row(31)]))
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        watched.gate.set()
        await asyncio.gather(first, stays)
        return watched.batches

    assert run(folder, scene) == [[20], [31]]


def test_a_failing_batch_is_its_own_affair(folder):
    async def scene(batcher, watched):
        watched.fails = True
        with pytest.raises(EngineError, match="failed on this input"):
            await batcher.run([row(10)])
        watched.fails = False
        assert len(await batcher.run([row(10)])) == 1

    run(folder, scene)


def test_the_end_leaves_nobody_waiting(folder):
    async def scene(batcher, watched):
        watched.gate.clear()
        tasks = await begun(batcher.run([row(20)]), batcher.run([row(40)]))
        threading.Timer(0.2, watched.gate.set).start()
        await batcher.close()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(isinstance(result, EngineDied) for result in results)
        with pytest.raises(EngineDied):
            await batcher.run([row(5)])

    run(folder, scene)
