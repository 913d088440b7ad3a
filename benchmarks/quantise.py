"""Four bits on the demo model: fitted to data against rounded to nearest at the same bytes, and the frontier of mixed
precision. Distances are taken on text that nothing was calibrated on, as the folder is served.

All arms of three seeds take hours on one core. With `--kept FOLDER` what is measured is kept, and what is there is not
measured again: `--seed` then shares the work among processes, and a last run without it writes the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import frontier, models
from benchmarks.page import DOCS, put, section, table
from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.evaluation import divergence
from lightship.evaluation.text import CALIBRATION_ROWS, CHUNK, scoring_set, tokeniser
from lightship.recipe import Precision
from lightship.targets import _sensitivity, openvino
from lightship.targets.pytorch import open_scorer
from lightship.work import digest_of

MEASURE = _sensitivity.measure
PAGE = DOCS / "quantisation.md"
POOL = 160  # rows that the calibration rows of a seed are drawn from, where the text has as many
PLAIN = {"name": "int4", "fit": False}
EQUAL = {
    "nearest": Precision(**PLAIN),
    "AWQ": Precision(name="int4", awq=True),
    "AWQ, scale estimation": Precision(name="int4", awq=True, scale_estimation=True),
    "AWQ, scale estimation, GPTQ": Precision(name="int4", awq=True, scale_estimation=True, gptq=True),
    "fit": Precision(name="int4"),
}
BUDGETS = (5.3, 5.7, 6.1, 6.5, 6.9, 7.3, 7.7, 8.0)
ROUNDED = {
    "nearest": Precision(**PLAIN),
    **{f"nearest, {share:.0%} of the body": Precision(**PLAIN, ratio=share) for share in (0.75, 0.5, 0.25)},
    "int8": Precision(name="int8"),
}
MIXED = {f"fit, at most {bits} bits": Precision(name="int4", bits=bits) for bits in BUDGETS}
TABLES = {"fit, tables in int4": Precision(name="int4", tables="int4"),
          "nearest, tables in int4": Precision(**PLAIN, tables="int4")}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What was measured of a precision with the calibration rows of one seed. `size`: bytes of graph and weights."""

    size: int
    kld: float
    error: float
    top1: float
    flips: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """The original, its export, what it says on the scored text, and the rows to calibrate with."""

    checkpoint: Checkpoint
    exported: Path
    reference: divergence.Reference
    pool: Sequence[Sequence[int]]
    weights: int
    costs: dict[str, list[_sensitivity.Cost]] = field(default_factory=dict)

    def measure(self, precision: Precision, seed: int, folder: Path) -> Arm:
        """Quantise into `folder` and compare."""
        rows = random.Random(seed).sample(list(self.pool), min(CALIBRATION_ROWS, len(self.pool)))
        begun = time.monotonic()
        with patch.object(_sensitivity, "measure", self._costs):
            openvino.quantise(self.exported, folder, precision, rows if precision.data_aware else (), self.checkpoint)
        openvino.finish(folder, precision)
        taken = time.monotonic() - begun
        gc.collect()
        found = divergence.compare(self.reference, openvino.open_scorer(folder))
        return Arm(
            sum(path.stat().st_size for path in folder.glob("openvino_model.*")),
            float(found.kld.mean()),
            float(found.kld.std(ddof=1) / np.sqrt(len(found.kld))),
            float(found.top1.mean()),
            float(found.flip.mean()),
            taken,
        )

    def _costs(self, model: Any, rows: Sequence[Sequence[int]], group: int) -> list[_sensitivity.Cost]:
        """What each matrix costs, measured once for all limits on `bits` of a seed."""
        name = digest_of([group, [list(row) for row in rows]])
        if name not in self.costs:
            self.costs[name] = MEASURE(model, rows, group)
        return self.costs[name]


def prepared(folder: Path, rows: int) -> Bench:
    """Everything that all arms share."""
    checkpoint = models.demo(folder / "demo")
    encode, start = tokeniser(checkpoint)
    text = default_text()
    pool = text.split()[0].encode(encode, CHUNK, POOL, start=start).sequences
    openvino.export(checkpoint, folder / "exported", "float32")
    scored = divergence.passage_batches(scoring_set(text, encode, CHUNK, rows, start=start))
    reference = divergence.record(open_scorer(checkpoint.folder), scored, folder / "reference")
    weights = checkpoint.load().num_parameters()
    gc.collect()
    return Bench(checkpoint, folder / "exported", reference, pool, weights)


def run(
    bench: Bench, arms: dict[str, Precision], seeds: Sequence[int], work: Path, kept: Path | None
) -> list[list[str]]:
    """The rows of a table. Arms that use no text are measured once; one that fails says with what."""
    heading = ["", "MB", "bits per weight", "mean KLD", "of the seeds", "same likeliest token", "flips", "minutes"]
    rows = [heading]
    for label, precision in arms.items():
        found: list[Arm] = []
        try:
            for seed in seeds if precision.data_aware else [0]:
                path = kept and kept / f"{label}, seed {seed}.json"
                if path and path.is_file():
                    found.append(Arm(**json.loads(path.read_text())))
                    continue
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    found.append(bench.measure(precision, seed, Path(folder)))
                if path:
                    path.write_text(json.dumps(asdict(found[-1])))
                print(f"{label}, seed {seed}: {found[-1]}", flush=True)
        except Exception as error:  # the page says which arms failed, the others go on
            print(f"{label}: {error!r}", flush=True)
            rows.append([label, f"failed: {type(error).__name__}: {str(error)[:120]}", *[""] * (len(heading) - 2)])
            continue
        rows.append([label, *_cells(found, bench.weights)])
    return rows


def _cells(found: Sequence[Arm], weights: int) -> list[str]:
    klds = [arm.kld for arm in found]
    mean = statistics.mean(klds)
    error = statistics.mean(arm.error for arm in found)
    return [
        f"{found[0].size / 1e6:.1f}",
        f"{found[0].size * 8 / weights:.2f}",
        f"{mean:.4f} ± {error:.4f}",
        f"{min(klds):.4f} – {max(klds):.4f}" if len(klds) > 1 else "–",
        f"{statistics.mean(arm.top1 for arm in found):.1%}",
        f"{statistics.mean(arm.flips for arm in found):.2%}",
        f"{max(arm.seconds for arm in found) / 60:.1f}",
    ]


GROUPS = {"equal": ("Four bits in groups of 64, tables in int8: the same bytes", EQUAL),
          "frontier": ("Mixed precision", {**ROUNDED, **MIXED}),
          "tables": ("Embedding and head in four bits too", TABLES)}  # fmt: skip


def main() -> None:
    """The tables that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantise", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="Draws of calibration rows.")
    parser.add_argument("--kept", type=Path, help="Folder of what is measured already.")
    parser.add_argument("--rows", type=int, default=12, help="Passages of 512 tokens that are scored.")
    parser.add_argument("--only", choices=list(GROUPS), action="append", help="One table; may be repeated.")
    asked = parser.parse_args()
    only = asked.only or list(GROUPS)
    names = {name: section(f"quantise --only {name}", PAGE) for name in only}  # before anything is measured
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        bench = prepared(Path(name), asked.rows)
        for group, label in names.items():
            title, arms = GROUPS[group]
            rows = run(bench, arms, asked.seed, Path(name), asked.kept)
            put(label, f"{title}.\n\n{table(rows)}", PAGE)
    frontier.main()


if __name__ == "__main__":
    main()
