"""A bundle's golden rows on the path that will serve it: the engine as it is loaded, with its cache and its batching.

`lightship check` compares all logits, for which it opens the weights a second time. Beside an engine at work there is
no memory for that, and it would not be the path that answers. What the served path tells of a position is its likeliest
token and that token's probability; the KL divergence of those two outcomes (this token, any other) bounds the whole one
from below (data processing inequality), so what is above the limit here is above it there.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightship.bundle import Bundle
from lightship.encoder import Encoder, Row
from lightship.engine import GenerationParams
from lightship.errors import LimitExceeded
from lightship.serving.batcher import Batcher
from lightship.serving.generation import Generates, Generation
from lightship.serving.model import ServedModel

POSITIONS = 32  # of the golden rows, spread evenly
LONGEST = 256  # tokens of a prompt
WARM = 16  # tokens that are written to warm up
EDGE = 1e-9  # probabilities are kept so far from 0 and 1
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """The mean of `values` (`what`, in nats or 1 − cosine) and its limit."""

    what: str
    values: tuple[float, ...]
    limit: float

    @property
    def mean(self) -> float:
        """The figure that is limited."""
        return math.fsum(self.values) / len(self.values)

    @property
    def stderr(self) -> float:
        """Of the mean, over positions or rows."""
        return float(np.std(self.values) / math.sqrt(len(self.values)))

    def check(self) -> None:
        """Raise `LimitExceeded` for a mean that is surely above the limit, by two standard errors, or not finite: the
        limit is for all positions, and these are some."""
        if not math.isfinite(self.mean):
            raise LimitExceeded(f"{self.what}: the bundle computes NaN or infinity on this machine")
        if not self.mean - 2 * self.stderr <= self.limit:
            raise LimitExceeded(f"{self.what} {self.mean:.3g} (± {self.stderr:.2g}, n = {len(self.values)}) "
                                f"is above the bundle's limit {self.limit:g}")  # fmt: skip


# ── Models that generate ────────────────────────────────────────────────────


async def warmed(bundle: Bundle, model: ServedModel, engines: Sequence[Generates]) -> None:
    """Let each engine answer once, and its tokens become text. Raises what the engine raises."""
    rows, _ = await asyncio.to_thread(bundle.golden)
    prompt = rows[0][: max(min(LONGEST, model.context - WARM), 1)]
    params = GenerationParams(min(WARM, model.context - len(prompt)), ignore_eos=True)
    await asyncio.gather(*(Generation(engine, model, [prompt], [params]).whole() for engine in engines))


async def replayed(bundle: Bundle, engines: Sequence[Generates]) -> Found:
    """The golden rows on each engine, all positions at once as clients would ask; the worst engine counts."""
    rows, arrays = await asyncio.to_thread(bundle.golden)
    starts = np.cumsum([0, *map(len, rows)])
    places = [(row, last) for row in range(len(rows)) for last in range(min(len(rows[row]), LONGEST))]
    chosen = [places[round(index)] for index in np.linspace(0, len(places) - 1, min(POSITIONS, len(places)))]

    async def one(engine: Generates, row: int, last: int) -> float:
        token, logprob = await _likeliest(engine, rows[row][: last + 1])
        at = int(starts[row]) + last
        return divergence(arrays["ids"][at], arrays["logprobs"][at], token, logprob)

    every = [await asyncio.gather(*(one(engine, row, last) for row, last in chosen)) for engine in engines]
    worst = max(every, key=lambda values: (not np.isfinite(values).all(), math.fsum(values)))
    return Found("mean KLD of the likeliest token", tuple(worst), float(bundle.report.meta["limit_kld"]))


async def _likeliest(engine: Generates, prompt: Sequence[int]) -> tuple[int, float]:
    params = GenerationParams(1, ignore_eos=True, logprobs=True)
    found = [event async for event in engine.generate(prompt, params)]
    return (next(token for event in found for token in event.token_ids),
            next(logprob for event in found for logprob in event.logprobs))  # fmt: skip


def divergence(ids: npt.NDArray[np.int32], logprobs: Floats, token: int, logprob: float) -> float:
    """KL(original ‖ served) in nats of the outcomes `token` and any other, at least: `ids` and `logprobs` are the
    original's likeliest. Of a token that is not among them the original's probability is known from above only."""
    if not math.isfinite(logprob):
        return math.inf
    known = np.exp(logprobs.astype(np.float64))
    served = min(max(math.exp(logprob), EDGE), 1 - EDGE)
    among = np.flatnonzero(ids == token)
    original = float(known[among[0]]) if len(among) else min(float(known.min()), max(1 - float(known.sum()), 0), served)
    original = min(max(original, EDGE), 1 - EDGE)
    rest = (1 - original) * math.log((1 - original) / (1 - served))
    return max(original * math.log(original / served) + rest, 0.0)


# ── Encoders ────────────────────────────────────────────────────────────────


async def encoded(bundle: Bundle, batcher: Batcher) -> Found:
    """The golden rows of an encoder, in batches as clients' inputs are."""
    rows, outputs = bundle.golden_outputs()
    found = await batcher.run([Row(tuple(ids), tuple(types)) for ids, types in rows])
    values = [_far(batcher.encoder, p, q) for p, q in zip(outputs, found, strict=True)]
    embeds = batcher.encoder.kind == "embedder"
    what, limit = ("1 − mean cosine", "limit_cosine_loss") if embeds else ("mean KLD", "limit_kld")
    return Found(what, tuple(values), float(bundle.report.meta[limit]))


def _far(encoder: Encoder, original: Floats, served: Floats) -> float:
    """As the gate measures it: 1 − cosine, or the mean KLD of a row's decisions."""
    if original.shape != served.shape or not np.isfinite(served).all():
        return math.inf
    p, q = original.astype(np.float64), served.astype(np.float64)
    if encoder.kind == "embedder":
        return max(1 - float((p * q).sum() / max(np.linalg.norm(p) * np.linalg.norm(q), 1e-30)), 0.0)
    return max(float((np.exp(p) * (p - q)).sum() / (p.size // p.shape[-1])), 0.0)
