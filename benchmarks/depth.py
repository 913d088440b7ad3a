"""The demo model with layers left out, or narrower ones: what it loses, against controls, and how much faster it is.

`quality`: greedy, block influence and random on −1 … −8 layers. `width`: MLPs cut, fitted or not. `speed`: exports.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.losses import SEEDS, Loss, calibration, measure, record_original, shown
from benchmarks.page import DOCS, put, section, spread, table
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.evaluation import speed
from lightship.evaluation.divergence import Reference
from lightship.recipe import Precision
from lightship.step import make_step
from lightship.targets import openvino

PAGE = DOCS / "compression.md"
DROPS = (1, 2, 4, 6, 8)
METHODS = ("greedy", "influence", "random")
ROWS = 2  # of 512 tokens, for each layer that greedy tries
CHUNKS = 16
WIDTHS: dict[str, dict[str, Any]] = {
    f"mlp {share}{', not uniform' * (not uniform)}{f', {importance}' * (importance != 'activation')}"
    f"{', not fitted' * (not update)}": {"mlp": share, "uniform": uniform, "importance": importance, "update": update}
    for share, uniform, importance, update in (
        (0.9, True, "activation", True), (0.9, True, "activation", False), (0.8, True, "activation", True),
        (0.8, True, "activation", False), (0.8, False, "activation", True), (0.8, True, "magnitude", True),
        (0.8, True, "random", True),
    )
}  # fmt: skip
PROMPT, NEW = 256, 65  # tokens; 64 of the new ones are timed


def cut(original: Checkpoint, folder: Path, step: str, options: Mapping[str, Any], seed: int = 0) -> Checkpoint:
    """`original` after one step, in `folder`, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    return make_step(step, options).apply(original, folder, calibration(original, seed))


def quality(original: Checkpoint, reference: Reference, work: Path) -> str:
    """All methods. What each leaves out is nested: the layers of −8 in their order are those of all smaller cuts."""
    arms: dict[str, list[Loss]] = {}
    dropped: dict[str, list[list[int]]] = {}
    for method in METHODS:
        for seed in range(SEEDS):
            options = {"drop": max(DROPS), "method": method, "rows": ROWS}
            order = cut(original, work / "cut", "depth", options, seed).lineage[-1]["dropped"]
            dropped.setdefault(method, []).append(order)
            for count in DROPS:
                made = cut(original, work / "cut", "depth", {"layers": order[:count]}, seed)
                arms.setdefault(f"−{count}, {method}", []).append(measure(reference, made))
                print(count, method, seed, arms[f"−{count}, {method}"][-1].metrics["kld"], file=sys.stderr, flush=True)
    ordered = {f"−{count}, {method}": arms[f"−{count}, {method}"] for count in DROPS for method in METHODS}
    orders = "; ".join(f"{method}: {' / '.join(' '.join(map(str, order)) for order in dropped[method])}"
                       for method in METHODS)  # fmt: skip
    return (
        f"{table(shown(ordered))}\n\nIn the order in which they are left out, for each seed: {orders}. {SEEDS} seeds, "
        f"which read different rows; means over them, of the KLD the range too. Greedy reads {ROWS} rows of 512 "
        f"tokens, influence 20; scored on {CHUNKS} chunks of held-out text."
    )


def widths(original: Checkpoint, reference: Reference, work: Path) -> str:
    """Every arm of `WIDTHS`; the random control with each seed."""
    arms = {}
    for label, options in WIDTHS.items():
        seeds = SEEDS if options["importance"] == "random" else 1
        arms[label] = [measure(reference, cut(original, work / "cut", "width", options, seed)) for seed in range(seeds)]
        print(label, arms[label][-1].metrics["kld"], file=sys.stderr, flush=True)
    return (
        f"{table(shown(arms))}\n\nChannels stay in multiples of 64, so that shares are at most those named: 1 344 "
        f"of 1 536 at 0.9 and 1 216 at 0.8. 20 calibration rows of 512 tokens; "
        f"scored on {CHUNKS} chunks of held-out text."
    )


def speeds(original: Checkpoint, work: Path, repeats: int) -> str:
    """Prefill and decode of int8 exports, all in this process and in turn; ratios to the whole model of one turn."""
    layers = int(original.config["num_hidden_layers"])
    arms: dict[str, tuple[str, dict[str, Any]] | None] = {"whole": None}
    arms |= {
        f"−{count} of {layers} layers": ("depth", {"layers": range(layers - count, layers)}) for count in (2, 4, 8)
    }
    arms |= {f"mlp {share}": ("width", {"mlp": share, "importance": "random", "update": False}) for share in (0.9, 0.8)}
    engines, found = {}, dict[str, list[tuple[float, float]]]()
    for number, (label, how) in enumerate(arms.items()):
        made = original if how is None else cut(original, work / f"{number}", *how)
        folder = work / f"runtime {number}"
        openvino.export(made, folder / "fp32")
        openvino.quantise(folder / "fp32", folder / "int8", Precision(name="int8"))
        openvino.finish(folder / "int8", Precision(name="int8"))
        engines[label] = openvino.open(folder / "int8", EngineSettings(prefix_cache=False))
    random = np.random.default_rng(0)
    for repeat in range(repeats + 1):
        for label, engine in engines.items():
            first, rest = speed.once(engine, random.integers(0, original.vocabulary, PROMPT).tolist(), NEW)
            if repeat:
                found.setdefault(label, []).append((PROMPT / first, (NEW - 1) / rest))
    rows = [["int8, OpenVINO", "prefill, tokens/s", "×", "decode, tokens/s", "×"]]
    for label, values in found.items():
        cells = [label]
        for place in (0, 1):
            cells.append(spread([each[place] for each in values], ".0f"))
            cells.append(
                spread([each[place] / whole[place] for each, whole in zip(values, found["whole"], strict=True)])
            )
        rows.append(cells)
    return (
        f"{table(rows)}\n\nMedian (range) of {repeats} turns, in each of which every arm runs once; {PROMPT} prompt "
        f"tokens, {NEW - 1} timed new ones, one request at a time. × is against the whole model of the same turn. "
        "Which layers or channels are left out changes no speed."
    )


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=__doc__)
    parser.add_argument("part", choices=["quality", "width", "speed"])
    parser.add_argument("--repeats", type=int, default=9, help="turns of speed")
    asked = parser.parse_args()
    name = section(f"depth {asked.part}", PAGE)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as held:
        work = Path(held)
        original = models.demo(work / "demo")
        if asked.part == "speed":
            put(name, speeds(original, work, asked.repeats), PAGE)
            return
        reference = record_original(original, work / "reference", CHUNKS)
        part = quality if asked.part == "quality" else widths
        put(name, part(original, reference, work), PAGE)


if __name__ == "__main__":
    main()
