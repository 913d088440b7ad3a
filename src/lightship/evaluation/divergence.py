"""How far a candidate's next-token distributions are from the original's, on the same tokens.

The original's log-probabilities are written to disk block by block, so that the two models are never in memory
together and no more than one block of either is. KL divergence is KL(original ‖ candidate) in nats per token, over
the whole vocabulary, as llama.cpp's perplexity tool reports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from lightship.calibration import Passages
from lightship.errors import LightshipError

Floats = npt.NDArray[np.float32]
ROUNDING = "rounding.json"
BLOCK = 128  # positions handled at a time: 128 × 128 256 logits in float32 are 66 MB


class BlockScorer(Protocol):
    """A scorer that hands out the logits of `size` positions at a time, each (batch, ≤ size, vocabulary)."""

    def blocks(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], size: int
    ) -> Iterator[npt.NDArray[np.float32]]: ...


class SourceScorer(Protocol):
    """An encoder-decoder: a scorer once it has read what the rows are written for, (batch, source length), padded on
    the right. Reading another source ends the scorer of the one before."""

    def given(self, source: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> BlockScorer: ...


AnyScorer = BlockScorer | SourceScorer


@dataclass(frozen=True)
class Batch:
    """Token rows, padded on the left. `mask` marks real tokens, `scored` the positions whose prediction counts.

    Of an encoder-decoder the rows are what is written, padded on the right, and `source` with `source_mask` is what it
    is written for, (batch, source length), padded on the right too.
    """

    name: str
    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    scored: npt.NDArray[np.bool_]
    source: npt.NDArray[np.int64] | None = None
    source_mask: npt.NDArray[np.int64] | None = None

    @staticmethod
    def of(name: str, rows: Sequence[Sequence[int]], scored_from: Sequence[int] | None = None) -> Batch:
        """Pad `rows` on the left; row r is scored from its token `scored_from[r]` on (default: from its first)."""
        length = max(len(row) for row in rows)
        ids = np.zeros((len(rows), length), np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        scored = np.zeros((len(rows), length), np.bool_)
        for index, row in enumerate(rows):
            pad = length - len(row)
            ids[index, pad:] = row
            mask[index, pad:] = 1
            scored[index, pad + (scored_from[index] if scored_from else 0) :] = True
        return Batch(name, ids, mask, scored)

    def labels(self) -> npt.NDArray[np.int64]:
        """(batch, length): the token that follows each position, −1 after the last."""
        labels = np.full_like(self.ids, -1)
        labels[:, :-1] = np.where(self.mask[:, 1:] == 1, self.ids[:, 1:], -1)
        return labels

    def bound(self, scorer: AnyScorer) -> BlockScorer:
        """What scores these rows: of an encoder-decoder `scorer` after it has read their source."""
        if self.source is None or self.source_mask is None:
            return cast(BlockScorer, scorer)
        return cast(SourceScorer, scorer).given(self.source, self.source_mask)


def passage_batches(passages: Passages) -> list[Batch]:
    """One row a passage, named by its number; position i is scored when token i + 1 is marked to count."""
    return [
        replace(Batch.of(str(number), [ids]), scored=np.array([[*marks[1:], False]]))
        for number, (ids, marks) in enumerate(zip(passages.sequences, passages.masks, strict=True))
        if any(marks[1:])
    ]


@dataclass(frozen=True)
class Reference:
    """The original's log-probabilities of the scored positions of `batches`, in files below `folder`. `rounding`: how
    far its own rounding moves one of them (nats), where that was measured."""

    folder: Path
    batches: tuple[Batch, ...]
    rounding: float | None = None

    def rows(self, batch: int, block: int) -> Floats:
        """(scored positions of that block, vocabulary)."""
        rows: Floats = np.load(self.folder / f"{batch:03}-{block:04}.npy", allow_pickle=False)
        return rows


@dataclass(frozen=True)
class Comparison:
    """Per scored position: KL divergence, whether the likeliest token agrees, whether one of both has the
    token that really follows as its likeliest and the other not, the original's margin between its two
    likeliest tokens (nats), the largest |Δ log p| over the tokens it holds likely (p > 1e-4), the log-probability of
    the token that really follows (NaN where none does) for original and candidate, and the name of its batch."""

    kld: Floats
    top1: npt.NDArray[np.bool_]
    flip: npt.NDArray[np.bool_]
    margin: Floats
    error: Floats
    original: Floats
    candidate: Floats
    batch: npt.NDArray[np.str_]

    def only(self, name: str) -> Comparison:
        """The positions of the batches called `name`."""
        keep = self.batch == name
        return Comparison(*(getattr(self, field)[keep] for field in self.__dataclass_fields__))


def log_softmax(logits: Floats) -> Floats:
    """Row-wise log-probabilities in float32, summed in float64. A row that overflowed says NaN, without a warning."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        normalised: Floats = logits - logits.max(axis=-1, keepdims=True)
    for rows in _in_cache(len(normalised)):
        total = np.exp(normalised[rows]).sum(axis=-1, keepdims=True, dtype=np.float64)
        normalised[rows] -= np.log(total).astype(np.float32)
    return normalised


def _in_cache(count: int) -> Iterator[slice]:
    """Slices of few rows: temporary arrays then stay in the processor's cache instead of being mapped anew each time
    (about three times faster over a vocabulary of 128 256)."""
    return (slice(start, start + 8) for start in range(0, max(count, 1), 8))


def record(original: AnyScorer, batches: Iterable[Batch], folder: Path) -> Reference:
    """Run the original over `batches` and keep its log-probabilities in `folder`. Raises on a non-finite value."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = tuple(batches)
    for index, batch in enumerate(kept):
        for block, rows, _ in _scored_blocks(original, batch):
            if not np.isfinite(rows).all():
                raise LightshipError(
                    "the original model itself computes NaN or infinity",
                    hint="its weights are damaged or overflow in float32; check the source before converting it",
                )
            np.save(folder / f"{index:03}-{block:04}.npy", rows)
    for index, batch in enumerate(kept):
        np.savez(
            folder / f"{index:03}.npz", **{name: value for name, value in vars(batch).items() if value is not None}
        )
    return Reference(folder, kept)


def reopen(folder: Path) -> Reference:
    """The reference that `record` left in `folder`."""
    batches = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as kept:
            batches.append(Batch(**{**kept, "name": str(kept["name"])}))
    path = folder / ROUNDING
    return Reference(folder, tuple(batches), json.loads(path.read_text()) if path.is_file() else None)


def _scored_blocks(scorer: AnyScorer, batch: Batch) -> Iterator[tuple[int, Floats, tuple[npt.NDArray[np.bool_], int]]]:
    """(block number, log-probabilities of its scored positions, (which those are, start of the block))."""
    for block, logits in enumerate(batch.bound(scorer).blocks(batch.ids, batch.mask, BLOCK)):
        start = block * BLOCK
        scored = batch.scored[:, start : start + logits.shape[1]]
        yield block, log_softmax(logits[scored]), (scored, start)


def compare(reference: Reference, candidate: AnyScorer) -> Comparison:
    """Run the candidate over the reference's batches. A NaN is kept as infinite divergence, never dropped."""
    parts: list[list[npt.NDArray[np.generic]]] = []
    for index, batch in enumerate(reference.batches):
        labels = batch.labels()
        for block, rows, (scored, start) in _scored_blocks(candidate, batch):
            label = labels[:, start : start + scored.shape[1]][scored]
            figures = _compare_rows(reference.rows(index, block), rows, label)
            parts.append([*figures, np.full(len(label), batch.name)])
    return Comparison(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def log_probabilities(scorer: AnyScorer, batches: Iterable[Batch]) -> list[Floats]:
    """Per batch the log-probabilities (nats) of the tokens that really follow its scored positions."""
    found = []
    for batch in batches:
        labels, parts = batch.labels(), list[Floats]()
        for _, rows, (scored, start) in _scored_blocks(scorer, batch):
            label = labels[:, start : start + scored.shape[1]][scored]
            parts.append(np.take_along_axis(rows, np.maximum(label, 0)[:, None], 1)[label >= 0, 0])
        found.append(np.concatenate(parts))
    return found


def _compare_rows(p: Floats, q: Floats, label: npt.NDArray[np.int64]) -> list[npt.NDArray[np.generic]]:
    """The fields of `Comparison` for original and candidate log-probabilities, each (positions, vocabulary)."""
    if p.shape != q.shape:
        raise LightshipError(f"original and candidate differ in shape: {p.shape} and {q.shape} (vocabulary changed?)")
    parts = [_compare_few(p[rows], q[rows], label[rows]) for rows in _in_cache(len(p))]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _compare_few(p: Floats, q: Floats, label: npt.NDArray[np.int64]) -> list[npt.NDArray[np.generic]]:
    finite: npt.NDArray[np.bool_] = np.atleast_1d(np.isfinite(q).all(axis=-1))
    q = q if finite.all() else np.where(finite[:, None], q, np.float32(0))
    weight = np.exp(p)
    delta = p - q
    kld = np.maximum((weight * delta).sum(axis=-1, dtype=np.float64), 0.0).astype(np.float32)
    error = np.abs(delta, out=delta).max(axis=-1, where=weight > 1e-4, initial=0.0)
    best = p.argmax(axis=-1)
    first = np.take_along_axis(p, best[:, None], 1)[:, 0]
    others = p.copy()
    np.put_along_axis(others, best[:, None], -np.inf, 1)
    other = q.argmax(axis=-1)
    taken = np.maximum(label, 0)[:, None]
    nothing = label < 0
    lost = np.float32(np.inf)
    return [
        np.where(finite, kld, lost),
        (best == other) & finite,
        ((best == label) != ((other == label) & finite)) & ~nothing,
        first - others.max(axis=-1),
        np.where(finite, error, lost),
        np.where(nothing, np.nan, np.take_along_axis(p, taken, 1)[:, 0]).astype(np.float32),
        np.where(nothing, np.nan, np.where(finite, np.take_along_axis(q, taken, 1)[:, 0], -lost)).astype(np.float32),
    ]
