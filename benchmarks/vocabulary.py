"""The demo model with the tokens that English text needs: what it saves, what it keeps, what it costs.

`quality`: bytes, text token for token, divergence, bits per byte. `speed`: the exported decode step.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.exported import HEADING, OPENVINO, SAID, compared
from benchmarks.page import DOCS, put, section, spread, table
from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.evaluation.divergence import BlockScorer, compare, log_softmax, passage_batches, record
from lightship.evaluation.text import CHUNK, scoring_set, tokeniser
from lightship.evaluation.vocabulary_view import Restricted
from lightship.step import Context, make_step
from lightship.targets.pytorch import open_scorer

PAGE = DOCS / "compression.md"
ARMS: dict[str, dict[str, Any]] = {"half": {"keep": 0.5}, "what the corpus needs": {}}
CHUNKS = 12
DOCUMENTS, CHARACTERS = 40, 1500
ROUNDS = 3
LOST = ["", "tokens", "bytes on disk", "KLD over kept tokens", "probability of dropped tokens",
           "held-out text: tokens ×", "bits per byte"]  # fmt: skip


def corpus() -> str:
    """English text that every Python carries: the part of the default text that is never scored, and the docstrings of
    the standard library."""
    texts = [document.text for document in default_text().split()[0].documents]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts += _docstrings(path)
    return "\n\n".join(texts)


def _docstrings(path: Path) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented) and (found := ast.get_docstring(node)):
            yield found


def held_out() -> list[str]:
    """Beginnings of the documents that are scored."""
    return [document.text[:CHARACTERS] for document in default_text().split()[1].documents[:DOCUMENTS]]


@dataclass(frozen=True)
class Read:
    """Of held-out text: its tokens, its bits per byte, and the probability given to tokens that are not in `kept`."""

    tokens: int
    bits_per_byte: float
    lost: float


def read(checkpoint: Checkpoint, scorer: BlockScorer, texts: Sequence[str], kept: np.ndarray | None = None) -> Read:
    """Every text by itself, all of its tokens but the first scored."""
    encode, _ = tokeniser(checkpoint)
    nats, lost, count, size = 0.0, 0.0, 0, 0
    for text in texts:
        ids = np.array([encode(text)])
        (logits,) = scorer.blocks(ids, np.ones_like(ids), ids.shape[1])
        rows = log_softmax(logits[0, :-1])
        nats -= float(np.take_along_axis(rows, ids[0, 1:, None], 1).sum(dtype=np.float64))
        if kept is not None:
            lost += float((1 - np.exp(rows[:, kept]).sum(1, dtype=np.float64)).sum())
        count, size = count + ids.shape[1], size + len(text.encode())
    return Read(count, nats / log(2) / size, lost / (count - len(texts)))


def cut(original: Checkpoint, work: Path, name: str) -> Checkpoint:
    """The arm `name`."""
    path = work / "corpus.txt"
    path.write_text(corpus(), encoding="utf-8")
    step = make_step("vocabulary", {"corpus": str(path), **ARMS[name]})
    return step.apply(original, work / name.split()[0], Context((), default_text().split()[0]))


def same_tokens(original: Checkpoint, made: Checkpoint, text: str) -> int:
    """How many tokens `text` has. Raises where they are not the same in both."""
    before, after = (tokeniser(each)[0](text) for each in (original, made))
    if made.kept_tokens[after].tolist() != before:  # type: ignore[index]
        raise SystemExit("the corpus has other tokens after the cut")
    return len(before)


def divergence(original: Checkpoint, made: Checkpoint, folder: Path) -> float:
    """Mean KLD over the kept tokens, on held-out passages in the tokens of the cut model."""
    encode, start = tokeniser(made)
    batches = passage_batches(scoring_set(default_text(), encode, CHUNK, CHUNKS, start=start))
    reference = record(Restricted(open_scorer(original.folder), made.kept_tokens), batches, folder)
    found = float(compare(reference, open_scorer(made.folder)).kld.mean())
    shutil.rmtree(folder)
    return found


def quality(work: Path) -> None:
    """What is saved, kept and lost."""
    original, texts = models.demo(work / "demo"), held_out()
    whole = read(original, open_scorer(original.folder), texts)
    rows = [LOST, ["original", f"{original.vocabulary:,}", f"{original.size_bytes:,}", "", "", "",
                      f"{whole.bits_per_byte:.4f}"]]  # fmt: skip
    for name in ARMS:
        made = cut(original, work, name)
        count = same_tokens(original, made, corpus())
        after = read(made, open_scorer(made.folder), texts)
        lost = read(original, open_scorer(original.folder), texts, made.kept_tokens).lost
        size = f"{made.size_bytes:,} ({made.size_bytes / original.size_bytes - 1:+.1%})"
        found = divergence(original, made, work / "reference")
        rows.append([name, f"{made.vocabulary:,}", size, f"{found:.1e}", f"{lost:.3%}",
                     f"{after.tokens / whole.tokens:.4f}", f"{after.bits_per_byte:.4f}"])  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    said = (
        f"Corpus: {len(corpus().encode()) / 1e6:.2f} MB of English, {count:,} tokens, the same in every row token for "
        f"token: the part of the default text that is never scored, and docstrings of the standard library. Held out: "
        f"{len(texts)} beginnings of {CHARACTERS} characters from the other part; KLD on {CHUNKS} passages of it."
    )
    put("vocabulary quality", f"{table(rows)}\n\n{said}", PAGE)


def speed(work: Path) -> None:
    """Decode of the exported graphs: each step reads the whole head."""
    original = models.demo(work / "demo")
    made = {"original": original, **{name: cut(original, work, name) for name in ARMS}}
    rows = [[*HEADING, "ms a step saved"]]
    for each in compared(made, work, ROUNDS, OPENVINO):
        saved = [1e3 / base.decode - 1e3 / one.decode for one, base in zip(each.speeds, each.base, strict=True)]
        rows.append([*each.cells(), spread(saved)])
    said = f"Median (lowest – highest) of {ROUNDS} rounds; × is against the original in the same round. {SAID}"
    put("vocabulary speed", f"{table(rows)}\n\n{said}", PAGE)


PARTS: dict[str, Callable[[Path], None]] = {"quality": quality, "speed": speed}


def main() -> None:
    """One part, or both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocabulary", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this")
    part = parser.parse_args().part
    for name in [part] if part else PARTS:
        section(f"vocabulary {name}", PAGE)
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as work:
            PARTS[name](Path(work))


if __name__ == "__main__":
    main()
