"""What encoder-decoders are gated and scored on: a source, and what is written for it.

Held-out text is the source; what the original itself writes for it (greedily, to its end) is scored: those are the
texts the candidate must write too. Where the user gives pairs, the targets of the file are scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightship.calibration import default_text, read_text
from lightship.checkpoint import Checkpoint, sha256
from lightship.errors import UsageError
from lightship.evaluation import golden, parity
from lightship.evaluation.divergence import Batch
from lightship.evaluation.text import scoring_set
from lightship.recipe import Recipe
from lightship.seq2seq import Seq2Seq

LONG_SOURCE, LONG_TARGET = 512, 256
SOURCE, WRITTEN = 128, 64  # tokens of a held-out passage, and of what is written for it at most
PASSAGES = {"quick": 16, "full": 64}
Row = list[int]


def pair_batch(
    name: str, about: Seq2Seq, sources: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], *, last: bool = True
) -> Batch:
    """`rows` to be written for `sources`, all padded on the right. Scored is what follows the start tokens; without
    `last` not what comes after a row's end."""
    source, source_mask = about.padded(sources)
    ids, mask = about.padded(rows)
    scored = mask == 1
    scored[:, : len(about.start) - 1] = False
    if not last:
        scored[np.arange(len(rows)), mask.sum(1) - 1] = False
    return Batch(name, ids, mask, scored, source, source_mask)


def gate_batches(tokens: Sequence[int], about: Seq2Seq, original: Any) -> list[Batch]:
    """The gate's rows from a run of real tokens (≥ 64), see `parity.gate_batches`: short sources of different lengths
    with short texts, in one batch; a long source with a long text; three texts that the original writes."""
    ours, start = list(tokens), list(about.start)
    offsets = np.linspace(0, len(ours) - max(parity.SHORT) - 1, len(parity.SHORT)).astype(int)
    short = [about.frame(ours[at : at + length]) for at, length in zip(offsets, parity.SHORT, strict=True)]
    texts = [start + ours[at : at + length] for at, length in zip(offsets[::-1], parity.SHORT[::-1], strict=True)]
    room = len(about.frame([]))
    long = about.frame(ours[: min(LONG_SOURCE, about.context) - room])
    text = start + ours[::-1][: min(LONG_TARGET, about.context) - len(start)]
    prompts = [about.frame(ours[at : at + parity.GREEDY_PROMPT]) for at in offsets[: parity.GREEDY_PROMPTS]]
    written = original.greedy(prompts, parity.GREEDY_TOKENS)
    return [
        pair_batch("short", about, short, texts),
        pair_batch("long", about, [long], [text]),
        pair_batch("greedy", about, prompts, [start + row for row in written], last=False),
    ]


@dataclass(frozen=True)
class PairTexts:
    """`gate`: one long run of tokens; `sources` to write for, and their `targets` where the user gave them, all as
    token ids."""

    about: Seq2Seq
    gate: tuple[int, ...]
    sources: tuple[Row, ...]
    targets: tuple[Row, ...] | None
    describe: dict[str, Any]
    calibrate: tuple[tuple[int, ...], ...] = ()

    @property
    def digest(self) -> str:
        """Of the text that is scored."""
        return str(self.describe["scoring_sha256"])

    @property
    def scored(self) -> str:
        """Which tokens count."""
        if self.targets is not None:
            return "the targets given, in the words of the file"
        return f"what the original writes for each passage of {SOURCE} tokens (greedily, {WRITTEN} tokens at most)"

    def gate_batches(self, original: Any) -> list[Batch]:
        """The gate's rows."""
        return gate_batches(self.gate, self.about, original)

    def score_batches(self, original: Any) -> tuple[list[Batch], float | None]:
        """A batch for each source, and the UTF-8 bytes of the targets where the user gave them."""
        texts = self.targets or tuple(written(row, self.about) for row in original.greedy(self.sources, WRITTEN))
        start = list(self.about.start)
        rows = [start + text for text in texts]
        batches = [
            pair_batch(str(number), self.about, [source], [row], last=False)
            for number, (source, row) in enumerate(zip(self.sources, rows, strict=True))
        ]
        if self.targets is None:
            return batches, None
        return batches, float(sum(len(self.about.tokenizer.decode(text).encode()) for text in texts))


def written(row: Row, about: Seq2Seq) -> Row:
    """`row` up to the token that ends it."""
    end = next((index for index, token in enumerate(row) if token in about.eos), len(row) - 1)
    return row[: end + 1]


def cut(recipe: Recipe, checkpoint: Checkpoint) -> PairTexts:
    """The tokens that `recipe` needs. Mistakes in the user's files are raised here, before any work is done."""
    about = Seq2Seq.load(checkpoint.folder)
    if recipe.golden is not None:
        golden.read_cases(Path(recipe.golden))

    def encode(text: str) -> list[int]:
        ids: list[int] = about.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    room, count = len(about.frame([])), PASSAGES[recipe.evaluate]
    gate = scoring_set(default_text(), encode, min(LONG_SOURCE, about.context), 1).sequences[0]
    if recipe.text is not None and recipe.text.endswith(".jsonl"):
        given = [_tokens(*pair, about) for pair in read_pairs(Path(recipe.text))][:count]
        sources, targets = tuple(source for source, _ in given), tuple(target for _, target in given)
        name, digest = Path(recipe.text).name, sha256(Path(recipe.text))
        return PairTexts(about, gate, sources, targets, _describe(name, False, digest, sources))
    text = default_text() if recipe.text is None else read_text(Path(recipe.text), _no_chat)
    held = scoring_set(text, encode, min(SOURCE, about.context - room), count)
    sources = tuple(about.frame(row) for row in held.sequences)
    return PairTexts(about, gate, sources, None, _describe(held.name, text.default, held.digest, sources))


def _describe(name: str, default: bool, digest: str, sources: Sequence[Row]) -> dict[str, Any]:
    return {"name": name, "default_only": default, "scoring_sha256": digest, "calibration_sha256": None,
            "tokens": sum(map(len, sources))}  # fmt: skip


def _no_chat(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    raise UsageError("an encoder-decoder has no chat", hint='give plain text, or {"source": …, "target": …} a line')


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """(source, target, where) of the pairs of a JSONL file. Raises `UsageError` naming the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path} is empty", hint='expected {"source": …, "target": …} a line')
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield *_pair(line, where := f"{path}, line {number}"), where


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        source, target = entry["source"], entry["target"]
        if not isinstance(source, str) or not isinstance(target, str) or not source.strip() or not target.strip():
            raise ValueError("source and target must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f'{where}: expected {{"source": text, "target": text}}, {error!r}') from error
    return source, target


def _tokens(source: str, target: str, where: str, about: Seq2Seq) -> tuple[Row, Row]:
    """Token ids of a pair, the target ended."""
    ids = about.tokenizer.encode(source).ids
    written = [*about.tokenizer.encode(target, add_special_tokens=False).ids, *about.eos[:1]]
    longest = max(len(ids), len(about.start) + len(written))
    if longest > about.context:
        raise UsageError(f"{where}: {longest} tokens, the model's context is {about.context}", hint="shorten the pair")
    return ids, written
