"""How far an encoder is from its original on the same real texts: labels, spans of answers, or embeddings.

Rows of many lengths in batches padded on the right show a dropped mask; one row at the full context shows positions
that were cut or shifted. Classifiers and extractive QA: KL(original ‖ candidate), nats per label decision or per start
and end. Embedders: 1 − cosine of the pooled embeddings, those that the server gives out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lightship.calibration import Text, paragraphs
from lightship.encoder import Encoder, Padded, Row, row_of
from lightship.encoder_costs import EncoderAmount
from lightship.engine import EncoderEngine
from lightship.errors import LightshipError, LimitExceeded, UsageError
from lightship.evaluation.parity import above
from lightship.evaluation.perplexity import mean_stderr
from lightship.evaluation.speed import BATCHES, SEQUENCE, SINGLES
from lightship.report import Metric

Floats = npt.NDArray[np.float32]
LENGTHS = (3, 5, 9, 16, 23, 32, 48, 64, 128)  # tokens of a row, in turn
GATE_ROWS, BATCH = 24, 8
SCORED = {"quick": 64, "full": 256}  # texts to score on
LONGEST = 2048  # tokens of the gate's longest row; attention needs memory for the square of it
QUESTION = 12  # words
PADDED = 50  # tokens of a row once padded, on average: most paragraphs are shorter than the length asked for


@dataclass(frozen=True)
class Rows:
    """Inputs as tokens, in batches of `BATCH` in their order, and the digest of the text they come from. `texts`: what
    each says in words, for another tokenizer; none where a row is no text."""

    rows: tuple[Row, ...]
    digest: str
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> list[list[list[int]]]:
        """Ids and types as plain data."""
        return [[list(row.ids), list(row.types)] for row in self.rows]

    def batches(self, encoder: Encoder) -> Iterator[Padded]:
        """Padded batches, in order."""
        for start in range(0, len(self.rows), BATCH):
            yield encoder.pad_rows(self.rows[start : start + BATCH])


def gate_rows(encoder: Encoder, text: Text) -> Rows:
    """Rows for the gates: the shortest there are, many lengths, and one at the full context (`LONGEST` at most)."""
    found = score_rows(encoder, text, GATE_ROWS)
    body = "\n\n".join(document.text for document in text.split()[1].documents)
    full, _ = _row(encoder, _copy(encoder), body, min(encoder.context, LONGEST))
    empty = row_of(encoder.tokenizer.encode("", "" if encoder.kind == "qa" else None))
    single = Row(full.ids[:1], full.types[:1])
    return Rows((*found.rows, full, single, *([empty] if len(empty) else [])), found.digest)


def score_rows(encoder: Encoder, text: Text, count: int) -> Rows:
    """Up to `count` rows from the documents that never calibrate, see `rows_from`."""
    return replace(rows_from(encoder, text.split()[1], count), digest=text.digest)


def rows_from(encoder: Encoder, text: Text, count: int) -> Rows:
    """Up to `count` rows, a paragraph of `text` each, of the lengths in `LENGTHS`. Raises `UsageError` for none."""
    rows, texts = list[Row](), list[str]()
    tokenizer = _copy(encoder)
    for paragraph in (each for document in text.documents for each in paragraphs(document.text)):
        if len(rows) == count:
            break
        row, words = _row(encoder, tokenizer, paragraph, min(LENGTHS[len(rows) % len(LENGTHS)], encoder.context))
        rows.append(row)
        texts.append(words)
    if not rows:
        raise UsageError(f"{text.name} is too short: no paragraph of it is left for this", hint="use a longer text")
    return Rows(tuple(rows), text.digest, tuple(texts))


def reread(encoder: Encoder, rows: Rows) -> Rows:
    """The texts of `rows` in the tokens of another `encoder`."""
    tokenizer = _copy(encoder)
    found = tuple(_row(encoder, tokenizer, text, encoder.context)[0] for text in rows.texts)
    return replace(rows, rows=found)


def amount(context: int, scored: int, repeats: int) -> EncoderAmount:
    """What is computed on with an encoder of `context`: the gate's rows, `scored` rows, and speed `repeats` times."""
    longest, usual, sequence = min(context, LONGEST), min(context, PADDED), min(context, SEQUENCE)
    calls = [SINGLES if size == 1 else 1 for size in BATCHES]
    return EncoderAmount(
        gate=GATE_ROWS * usual + 3 * longest,
        gate_calls=GATE_ROWS // BATCH + 1,
        score=scored * usual,
        score_calls=-(-scored // BATCH),
        widest=max(3 * longest, BATCH * min(context, max(LENGTHS))),
        longest=longest,
        speed=(repeats + 1) * sum(size * each for size, each in zip(BATCHES, calls, strict=True)) * sequence,
        speed_calls=(repeats + 1) * sum(calls),
        speed_widest=max(BATCHES) * sequence,
    )


def _copy(encoder: Encoder) -> Tokenizer:
    """The encoder's tokenizer, to be changed; making it takes a second where the vocabulary is large."""
    return Tokenizer.from_str(encoder.tokenizer.to_str())


def _row(encoder: Encoder, tokenizer: Tokenizer, text: str, length: int) -> tuple[Row, str]:
    """`text` as a row of at most `length` tokens, special ones included, and the part of it that they say; for
    extractive QA as question and context. Of `tokenizer`, a copy of the encoder's, the truncation is changed."""
    pair = encoder.kind == "qa"
    longest = max(length, tokenizer.num_special_tokens_to_add(pair) + 2 * (1 + pair))
    tokenizer.enable_truncation(min(longest, encoder.context))
    text = text.lower() if encoder.lower else text
    if pair:
        return row_of(tokenizer.encode(" ".join(text.split()[:QUESTION]), text)), text
    found = tokenizer.encode(text)
    return row_of(found), text[: max((end for _, end in found.offsets), default=0)]


# ── Original and candidate ──────────────────────────────────────────────────


def record(encoder: Encoder, engine: EncoderEngine, rows: Rows, folder: Path) -> None:
    """Keep in `folder` what `rows` mean to the original. Raises `LightshipError` when it computes NaN or infinity."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (batch, meaning) in enumerate(_run(encoder, engine, rows)):
        if not np.isfinite(meaning).all():
            raise LightshipError("the original model itself computes NaN or infinity",
                                 hint="its weights are damaged or overflow; check the source")  # fmt: skip
        np.savez(folder / f"{index:04}.npz", meaning=meaning, mask=batch.mask)


def _run(encoder: Encoder, engine: EncoderEngine, rows: Rows) -> Iterator[tuple[Padded, Floats]]:
    for batch in rows.batches(encoder):
        yield batch, encoder.meaning(engine.run(batch.ids, batch.mask, batch.types), batch.mask)


@dataclass(frozen=True)
class Distance:
    """Per row: the distance from the original (KLD, or 1 − cosine), and whether both decide alike."""

    values: npt.NDArray[np.float64]
    same: npt.NDArray[np.bool_]
    embeds: bool

    @property
    def mean(self) -> float:
        """The figure that is limited."""
        return float(self.values.mean())

    @property
    def name(self) -> str:
        """What that figure is called."""
        return "cosine_loss" if self.embeds else "kld"

    def lines(self) -> list[str]:
        """For people."""
        mean, worst, n = self.mean, float(self.values.max()), len(self.values)
        if self.embeds:
            return [f"mean cosine {1 - mean:.6f} (1 − cosine {mean:.2e})   lowest {1 - worst:.6f}   (n = {n} texts)"]
        return [f"mean KLD {mean:.2e}   largest {worst:.2e}   same decision {self.same.mean():.2%}   (n = {n} texts)"]

    def metrics(self, prefix: str = "") -> list[Metric]:
        """For the report."""
        n, stderr = len(self.values), mean_stderr([self.values])
        where = "texts of many lengths, in padded batches; s.e. over texts"
        if self.embeds:
            return [
                Metric(f"{prefix}cosine_loss", self.mean, "", n, stderr, "lower", 0.0,
                       f"mean of 1 − cosine(original, this) of the pooled embeddings, {where}"),
                Metric(f"{prefix}cosine_min", 1 - float(self.values.max()), "", n, None, "higher", 1.0,
                       "lowest cosine of a text's embedding with the original's"),
            ]  # fmt: skip
        return [
            Metric(f"{prefix}kld", self.mean, "nats", n, stderr, "lower", 0.0,
                   f"mean KL(original ‖ candidate) per decision, {where}"),
            Metric(f"{prefix}top1", float(self.same.mean()), "share", n, mean_stderr([self.same.astype(np.float64)]),
                   "higher", 1.0, "texts on which original and candidate decide alike (label, labels, or span)"),
        ]  # fmt: skip


def distance(encoder: Encoder, engine: EncoderEngine, rows: Rows, folder: Path) -> Distance:
    """Run the candidate over `rows` and compare it with what `record` kept. NaN counts as infinitely far."""
    parts = []
    for index, (_, meaning) in enumerate(_run(encoder, engine, rows)):
        with np.load(folder / f"{index:04}.npz", allow_pickle=False) as kept:
            parts.append(compare(encoder, kept["meaning"], meaning))
    return _distance(encoder, parts)


def _distance(encoder: Encoder, parts: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> Distance:
    far, same = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Distance(far, same, encoder.kind == "embedder")


def compare(encoder: Encoder, original: Floats, candidate: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(distance, same decision) per row of a batch, from what `Encoder.meaning` gives for both."""
    if original.shape != candidate.shape:
        raise LightshipError(f"original and candidate differ in shape: {original.shape} and {candidate.shape}")
    rows = len(original)
    p, q = original.reshape(rows, -1).astype(np.float64), candidate.reshape(rows, -1).astype(np.float64)
    finite: npt.NDArray[np.bool_] = np.atleast_1d(np.isfinite(q).all(-1))
    if encoder.kind == "embedder":
        norms = np.linalg.norm(p, axis=-1) * np.linalg.norm(q, axis=-1)
        far = 1 - (p * q).sum(-1) / np.maximum(norms, 1e-30)
        return np.where(finite, np.maximum(far, 0), np.inf), finite
    decisions = original.size // rows // original.shape[-1]  # 1 of labels, each label's own, or start and end
    kld = (np.exp(p) * np.where(finite[:, None], p - q, 0)).sum(-1) / decisions
    best = original.argmax(-1) == candidate.argmax(-1)
    return np.where(finite, np.maximum(kld, 0), np.inf), best.reshape(rows, -1).all(-1) & finite


def check_distance(found: Distance, limit: float, stage: str) -> None:
    """Raise `LimitExceeded` with the figures when the mean distance is above `limit` or not finite."""
    if not found.mean <= limit:
        what = "1 − mean cosine" if found.embeds else "mean KLD"
        raise LimitExceeded(
            f"{stage}: {what} {found.mean:.3g} exceeds the limit {limit:g}; nothing is shipped\n  "
            + "\n  ".join(found.lines()),
            hint=f'raise the precision, or accept it on purpose: --accept "{found.name}<={above(found.mean)}"'
            if math.isfinite(found.mean)
            else "the candidate computes NaN or infinity: this is a fault, not a loss of precision",
        )


# ── Golden rows ─────────────────────────────────────────────────────────────


def write_golden(encoder: Encoder, rows: Rows, reference: Path, folder: Path) -> None:
    """Write `rows` and what they mean to the original, as `record` kept it: `tokens.json` {"rows", "types"} and
    `outputs.npz` with one float32 array a row, named by its number, padding left out."""
    folder.mkdir(parents=True)
    said: dict[str, Floats] = {}
    for path in sorted(reference.glob("*.npz")):
        with np.load(path, allow_pickle=False) as kept:
            for meaning, mask in zip(kept["meaning"], kept["mask"], strict=True):
                said[str(len(said))] = meaning[:, : int(mask.sum())] if encoder.kind == "qa" else meaning
    tokens = {"rows": [list(row.ids) for row in rows.rows], "types": [list(row.types) for row in rows.rows]}
    (folder / "tokens.json").write_text(json.dumps(tokens) + "\n")
    np.savez(folder / "outputs.npz", **said)  # type: ignore[arg-type]


def replay(
    encoder: Encoder, engine: EncoderEngine, rows: Sequence[tuple[list[int], list[int]]], outputs: Sequence[Floats]
) -> Distance:
    """Distance of `engine` from the golden outputs, one row at a time."""
    parts = []
    for (ids, types), output in zip(rows, outputs, strict=True):
        batch = encoder.pad_rows([Row(tuple(ids), tuple(types))])
        meaning = encoder.meaning(engine.run(batch.ids, batch.mask, batch.types), batch.mask)
        parts.append(compare(encoder, output[None], meaning))
    return _distance(encoder, parts)
