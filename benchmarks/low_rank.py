"""The low-rank step on the demo model: what it loses at equal size, and where it is faster.

`quality`: held-out text, three calibration sets. All arms of a table have the parameters that equal shares, rounded
down to ranks of 8, leave; in `ranks shuffled` the first arm's ranks are dealt out anew among layers of one shape.
`embedding`: the table of tokens alone. `latency`: the whole model, exported to OpenVINO with every layer at one share
of its parameters, above 1 too; what weights hold does not change the work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.exported import HEADING, OPENVINO, SAID, compared
from benchmarks.losses import CHUNKS, SEEDS, Loss, calibration, measure, record_original, shown
from benchmarks.page import DOCS, put, section, spread, table
from lightship.checkpoint import Checkpoint, save
from lightship.compression._allocation import Curve, Ranks, allocate, uniform
from lightship.compression.svd import Moments, Svd
from lightship.layers import linears, weight_of
from lightship.low_rank import LowRank
from lightship.step import Context
from lightship.structure import replace_module

PAGE = DOCS / "compression.md"
KEEPS = (0.9, 0.8)
EMBEDDINGS = (0.9, 0.8, 0.5)
SHARES = (1.1, 0.95, 0.8, 0.5)
MEASURED: dict[int, tuple[Moments, Moments]] = {}  # by seed: the arms of one seed read the same text


class Arm(Svd):
    """The step with no more parameters than equal shares leave, reading the text of a seed once for all arms."""

    def moments(self, model: Any, layers: Mapping[str, Any], context: Context) -> tuple[Moments, Moments]:
        if context.seed not in MEASURED:
            MEASURED.clear()
            MEASURED[context.seed] = super().moments(model, layers, context)
        return MEASURED[context.seed]

    def ranks(self, curves: Mapping[str, Curve]) -> Ranks:
        even = uniform(curves, self.keep)
        if self.allocation == "uniform":
            return even
        return allocate(curves, sum(curves[name].cost(rank) for name, rank in even.items()))


class Shuffled(Arm):
    """Its ranks dealt out anew among layers of one shape: the same bytes, and chance in place of the curves."""

    def ranks(self, curves: Mapping[str, Curve]) -> Ranks:
        found, draw, dealt = super().ranks(curves), np.random.default_rng(0), Ranks()
        for shape in {(curve.outputs, curve.inputs) for curve in curves.values()}:
            names = [name for name, curve in curves.items() if (curve.outputs, curve.inputs) == shape]
            dealt |= {names[to]: found[name] for name, to in zip(names, draw.permutation(len(names)), strict=True)}
        return dealt


ARMS: dict[str, Callable[[float], Svd]] = {
    "fisher (the default)": lambda keep: Arm(keep=keep),
    "fisher, the same share of every layer": lambda keep: Arm(keep=keep, allocation="uniform"),
    "whitened": lambda keep: Arm(keep=keep, method="whitened"),
    "whitened, the same share (SVD-LLM)": lambda keep: Arm(keep=keep, method="whitened", allocation="uniform"),
    "scaled, the same share (as ASVD)": lambda keep: Arm(keep=keep, method="scaled", allocation="uniform"),
    "plain, the same share": lambda keep: Arm(keep=keep, method="plain", allocation="uniform"),
    "fisher, ranks shuffled": lambda keep: Shuffled(keep=keep),
}


def embedding(work: Path, seeds: int, chunks: int) -> str:
    """The table that embedding and head are, weighed by the calibration text and as it is."""
    original = models.demo(work / "demo")
    reference = record_original(original, work / "reference", chunks)
    found: dict[str, list[Loss]] = {}
    for share in EMBEDDINGS:
        for label, method, times in (("weighed (the default)", "fisher", seeds), ("plain", "plain", 1)):
            step = Svd(keep=1, embedding=share, method=method)
            for seed in range(times):
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    made = step.apply(original, Path(folder) / "made", context := calibration(original, seed))
                    loss = measure(reference, made)
                found.setdefault(f"{share:.0%} of the table, {label}", []).append(loss)
                print(share, label, seed, f"KLD {loss.metrics['kld'].value:.4f}", file=sys.stderr, flush=True)
    said = (
        f"The linear layers are whole. Held-out text: {chunks} passages of 512 tokens, the second half of each scored. "
        f"Calibration: {context.tokens:,} tokens, {seeds} times with other rows: mean (range)."
    )
    return f"{table(shown(found))}\n\n{said}"


def quality(work: Path, seeds: int, chunks: int, keeps: tuple[float, ...], rows: int | None) -> str:
    """A table for each share."""
    original = models.demo(work / "demo")
    reference = record_original(original, work / "reference", chunks)
    nothing = measure(reference, original)
    found: dict[float, dict[str, list[Loss]]] = {keep: {"the original again": [nothing]} for keep in keeps}
    foreseen: dict[float, list[float]] = {keep: [] for keep in keeps}
    for seed in range(seeds):
        context = calibration(original, seed, rows)
        for keep in keeps:
            for label, arm in ARMS.items():
                began = time.perf_counter()
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    made = arm(keep).apply(original, Path(folder) / "made", context)
                    loss = measure(reference, made)
                    if label == next(iter(ARMS)):
                        foreseen[keep].append(made.lineage[-1]["predicted_kld"])
                found[keep].setdefault(label, []).append(loss)
                took = time.perf_counter() - began
                print(f"seed {seed}, keep {keep}, {label}: KLD {loss.metrics['kld'].value:.4f}, {took:.0f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
    parts = [f"{keep:.0%} of the linear layers' parameters kept; the default foresaw a KL divergence of "
             f"{spread(foreseen[keep], '.4f')}:\n\n{table(shown(found[keep]))}" for keep in keeps]  # fmt: skip
    times = "once" if seeds == 1 else f"{seeds} times with other rows: mean (range)"
    parts.append(
        f"Held-out text: {chunks} passages of 512 tokens, the second half of each scored. Calibration: "
        f"{context.tokens:,} tokens, {times}; ± is the standard error over passages. float32 arithmetic. "
        "Equal shares are rounded down to ranks of 8; the other arms have at most as many parameters."
    )
    return "\n\n".join(parts)


def cut_evenly(original: Checkpoint, share: float, folder: Path) -> Checkpoint:
    """Every linear layer as a product with `share` of its parameters, contents random."""
    model = original.load()
    for name, layer in linears(model).items():
        outputs, inputs = weight_of(layer).shape
        made = LowRank.of(layer, int(share * outputs * inputs / (outputs + inputs)) // 8 * 8)  # as the step has them
        for part in made:
            part.weight.data.normal_(std=part.in_features**-0.5)
        replace_module(model, name, made)
    return save(model, original.folder, folder, {"step": "cut_evenly", "options": {"share": share}})


def latency(work: Path, repeats: int) -> str:
    """Ratios to the whole model in the same process, every arm in turn."""
    original = models.demo(work / "demo")
    cut = {f"{share:.0%} of each layer": cut_evenly(original, share, work / f"cut-{share}") for share in SHARES}
    rows = [HEADING, *(each.cells() for each in compared({"whole": original, **cut}, work, repeats, OPENVINO))]
    return f"{table(rows)}\n\nMedian (range) of {repeats} rounds, × against the whole model of the same round. {SAID}"


def main() -> None:
    """One section a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_rank", description=__doc__)
    parser.add_argument("what", choices=["quality", "embedding", "latency"])
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(1, SEEDS + 1))
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="held-out passages")
    parser.add_argument("--rows", type=int, help="of 512 tokens to calibrate with (default: 20)")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    name = section(f"low_rank {asked.what}", PAGE)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        if asked.what == "quality":
            put(name, quality(Path(folder), asked.seeds, asked.chunks, tuple(asked.keep), asked.rows), PAGE)
        elif asked.what == "embedding":
            put(name, embedding(Path(folder), asked.seeds, asked.chunks), PAGE)
        else:
            put(name, latency(Path(folder), asked.repeats), PAGE)


if __name__ == "__main__":
    main()
