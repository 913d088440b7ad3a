"""What lighter decoders lose against their original on held-out text: the part that benchmarks of compression share.

reference = record_original(original, folder)
context = calibration(original, seed=0)                    # for a step; seeds read different rows
loss = measure(reference, step.apply(original, made, context))
table(shown({"arm": [loss, …]}))                           # one loss a seed
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.evaluation.divergence import Reference, compare, passage_batches, record
from lightship.evaluation.perplexity import quality
from lightship.evaluation.text import CHUNK, scoring_set, tokeniser
from lightship.report import Metric
from lightship.step import Context
from lightship.targets.pytorch import open_scorer

SEEDS = 3
CHUNKS = 24  # of 512 tokens, the second half of each scored
HEADING = ["", "mean KLD, nats/token", "KLD p99", "same top-1", "perplexity ×", "bytes on disk"]


@dataclass(frozen=True)
class Loss:
    """Of one checkpoint: its metrics by name (`kld`, `kld_p99`, `top1`, `perplexity_ratio`, …), bytes of its folder."""

    metrics: Mapping[str, Metric]
    size: int


def record_original(original: Checkpoint, folder: Path, chunks: int = CHUNKS) -> Reference:
    """The original's log-probabilities on held-out text, in `folder`: 50 MB a chunk with a vocabulary of 49 152."""
    encode, start = tokeniser(original)
    passages = scoring_set(default_text(), encode, min(CHUNK, original.context_length), chunks, start=start)
    return record(open_scorer(original.folder), passage_batches(passages), folder)


def calibration(original: Checkpoint, seed: int, rows: int | None = None) -> Context:
    """Rows of 512 tokens that are never scored, every third from `seed` on: 20 of the demo model's, or `rows`."""
    encode, start = tokeniser(original)
    text = default_text().split()[0]
    passages = text.encode(encode, min(CHUNK, original.context_length), 1000, start=start)
    chosen = passages.sequences[seed::SEEDS][:rows]
    batches = tuple({"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)}
                    for row in chosen)  # fmt: skip
    return Context(batches, text, seed, lambda line: print(line, file=sys.stderr, flush=True))


def measure(reference: Reference, candidate: Checkpoint) -> Loss:
    """Score `candidate` in float32 on the reference's passages."""
    found = quality(compare(reference, open_scorer(candidate.folder)), None, "second half of each passage")
    return Loss({metric.name: metric for metric in found}, candidate.size_bytes)


def shown(arms: Mapping[str, Sequence[Loss]]) -> list[list[str]]:
    """The rows of a table, one an arm, under `HEADING`: means over its seeds. Of the KLD also the standard error over
    passages, the largest of the seeds', and the range over the seeds where there are several."""
    return [HEADING, *([label, *_cells(losses)] for label, losses in arms.items())]


def _cells(losses: Sequence[Loss]) -> list[str]:
    def values(name: str) -> list[float]:
        return [loss.metrics[name].value for loss in losses]

    kld = values("kld")
    error = max(loss.metrics["kld"].stderr or 0.0 for loss in losses)
    across = f" ({min(kld):.4f} – {max(kld):.4f})" if len(losses) > 1 else ""
    return [
        f"{fmean(kld):.4f} ± {error:.4f}{across}",
        f"{fmean(values('kld_p99')):.3f}",
        f"{fmean(values('top1')):.2%}",
        f"{fmean(values('perplexity_ratio')):.4f}",
        f"{fmean(loss.size for loss in losses):,.0f}",
    ]
