"""The ONNX graph of the demo model fused into ONNX Runtime's own operators, or as exported: speed and drift."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir

from benchmarks import models
from benchmarks.page import put, spread, table
from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.evaluation import divergence, parity, speed
from lightship.evaluation.divergence import Reference
from lightship.evaluation.text import scoring_set, tokeniser
from lightship.recipe import Precision
from lightship.targets import onnx, pytorch

NEW = 65  # tokens generated: 64 are timed


@dataclass
class Arm:
    """One runtime folder and what was measured of it: tokens/s by length of the prompt."""

    folder: Path
    nodes: int
    kld: float
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)


def export_unfused(checkpoint: Checkpoint, folder: Path) -> None:
    """As `onnx.export`, without the fusions."""
    fuse: Callable[..., None] = onnx._fuse
    onnx._fuse = lambda model: None
    try:
        onnx.export(checkpoint, folder)
    finally:
        onnx._fuse = fuse


def reference(checkpoint: Checkpoint, folder: Path) -> Reference:
    """What the gates compare with."""
    original = pytorch.open_scorer(checkpoint.folder)
    tokens = scoring_set(default_text(), tokeniser(checkpoint)[0], 1024, 1).sequences[0]
    return divergence.record(
        original, parity.gate_batches(tokens, checkpoint.context_length or 2048, original.greedy), folder
    )


def arms(checkpoint: Checkpoint, work: Path) -> dict[str, Arm]:
    """Both graphs in fp32 and int8, gated."""
    gate = reference(checkpoint, work / "reference")
    export_unfused(checkpoint, work / "fp32, as exported")
    onnx.export(checkpoint, work / "fp32, fused")
    for graph in ("as exported", "fused"):
        onnx.quantise(work / f"fp32, {graph}", work / f"int8, {graph}", Precision(name="int8"))
    made = {}
    for precision in ("fp32", "int8"):
        for graph in ("as exported", "fused"):
            folder = work / f"{precision}, {graph}"
            nodes = len(onnx_ir.load(folder / onnx.GRAPH).graph)
            made[folder.name] = Arm(folder, nodes, parity.parity(gate, onnx.open_scorer(folder)).mean_kld)
    return made


def measure(made: dict[str, Arm], prompt: int, repeats: int) -> None:
    """Every arm in turn, `repeats` times after a warm-up, all in this process."""
    random = np.random.default_rng(0)
    engines = {name: onnx.open(arm.folder, EngineSettings()) for name, arm in made.items()}
    for repeat in range(repeats + 1):
        for name, arm in made.items():
            tokens = random.integers(0, engines[name].vocabulary, prompt).tolist()
            first, rest = speed.once(engines[name], tokens, NEW)
            if repeat:
                arm.prefill.setdefault(prompt, []).append(prompt / first)
                arm.decode.setdefault(prompt, []).append((NEW - 1) / rest)
            print(f"{prompt:5} {name:20} {prompt / first:8.1f} {(NEW - 1) / rest:6.1f}", file=sys.stderr)


def main() -> None:
    """Both prompts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusions", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        work = Path(name)
        made = arms(models.demo(work / "demo"), work)
        for prompt in (256, 1024):
            measure(made, prompt, asked.repeats)
    rows = [["graph", "nodes", "mean KLD", "prompt", "prefill tokens/s", "decode tokens/s", "decode, fused / exported"]]
    for prompt in (256, 1024):
        for label, arm in made.items():
            plain = made[label.replace("fused", "as exported")].decode[prompt]
            ratio = statistics.median(one / other for one, other in zip(arm.decode[prompt], plain, strict=True))
            rows.append([label, str(arm.nodes), f"{arm.kld:.2g}", str(prompt), spread(arm.prefill[prompt], ".0f"),
                         spread(arm.decode[prompt], ".1f"), f"{ratio:.2f}"])  # fmt: skip
    put(
        "fusions",
        f"{table(rows)}\n\n{NEW - 1} tokens written after the prompt; median (range) of {asked.repeats} turns.",
    )


if __name__ == "__main__":
    main()
