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

from benchmarks import models
from benchmarks.exported import HEADING, SAID, compared
from benchmarks.losses import SEEDS, Loss, calibration, measure, record_original, shown
from benchmarks.page import DOCS, put, section, table
from lightship.checkpoint import Checkpoint
from lightship.evaluation.divergence import Reference
from lightship.step import make_step

PAGE = DOCS / "compression.md"
DROPS = (1, 2, 4, 6, 8)
METHODS = ("greedy", "influence", "random")
ROWS = 2  # of 512 tokens, for each layer that greedy tries
CHUNKS = 12
WIDTHS: dict[str, dict[str, Any]] = {
    f"mlp {share}{', not uniform' * (not uniform)}{f', {importance}' * (importance != 'fisher')}"
    f"{', not fitted' * (not update)}": {
        "mlp": share if uniform else 1216 / 1536,  # as many channels in all as uniform ones leave
        "uniform": uniform, "importance": importance, "update": update,
    }
    for share, uniform, importance, update in (
        (0.9, True, "fisher", True), (0.9, True, "fisher", False), (0.8, True, "fisher", True),
        (0.8, True, "fisher", False), (0.8, False, "fisher", True), (0.8, True, "activation", True),
        (0.8, False, "activation", True), (0.8, True, "magnitude", True), (0.8, True, "random", True),
    )
}  # fmt: skip


def cut(original: Checkpoint, folder: Path, step: str, options: Mapping[str, Any], seed: int = 0) -> Checkpoint:
    """`original` after one step, in `folder`, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    return make_step(step, options).apply(original, folder, calibration(original, seed))


def quality(original: Checkpoint, reference: Reference, work: Path) -> str:
    """All methods. What each leaves out is nested: the layers of −8 in their order are those of all smaller cuts."""
    arms: dict[str, list[Loss]] = {}
    dropped: dict[str, list[list[int]]] = {}
    known: dict[frozenset[int], Loss] = {}  # layers left out alike are the same model
    for method in METHODS:
        for seed in range(SEEDS):
            options = {"drop": max(DROPS), "method": method, "rows": ROWS}
            order = cut(original, work / "cut", "depth", options, seed).lineage[-1]["dropped"]
            dropped.setdefault(method, []).append(order)
            for count in DROPS:
                gone = frozenset(order[:count])
                if gone not in known:
                    known[gone] = measure(reference, cut(original, work / "cut", "depth", {"layers": order[:count]}))
                arms.setdefault(f"−{count}, {method}", []).append(known[gone])
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
        f"of 1 536 at 0.9 and 1 216 at 0.8, on the average where layers differ. 20 calibration rows of 512 tokens; "
        f"scored on {CHUNKS} chunks of held-out text."
    )


def speeds(original: Checkpoint, work: Path, repeats: int) -> str:
    """Prefill and decode of int8 exports in turn."""
    layers = int(original.config["num_hidden_layers"])
    arms = {"whole": original}
    for count in (2, 4, 8):
        options = {"layers": range(layers - count, layers)}
        arms[f"−{count} of {layers} layers"] = cut(original, work / f"depth {count}", "depth", options)
    for share in (0.9, 0.8):
        options = {"mlp": share, "importance": "random", "update": False}
        arms[f"mlp {share}"] = cut(original, work / f"width {share}", "width", options)
    rows = [HEADING, *(each.cells() for each in compared(arms, work, repeats, [("openvino", "int8")]))]
    return (
        f"{table(rows)}\n\nMedian (range) of {repeats} rounds, × against the whole model of the same round. {SAID} "
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
