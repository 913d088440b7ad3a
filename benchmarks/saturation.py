"""ONNX int8 with the sums of ONNX Runtime's own choice and with those that do not saturate: loss and speed.

all-MiniLM-L6-v2 on token ids drawn at random; the sessions take turns. With VNNI both int8 sessions are the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks import models
from benchmarks.page import DOCS, put, section, spread, table
from lightship.evaluation.speed import SEQUENCE
from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from lightship.serving.placement import places
from lightship.targets.onnx import GRAPH

PAGE = DOCS / "quantisation.md"
ARMS = {"fp32": ("fp32", "0"), "int8 as ONNX Runtime has it": ("int8", "0"), "int8, exact sums": ("int8", "1")}
BATCHES = {1: 60, 32: 4}  # runs of each, in a round


def opened(folder: Path, exact: str) -> Any:
    """A session, as the target opens it but for the sums."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = places()[0].threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", exact)
    return onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])


def feed(session: Any, batch: int) -> dict[str, np.ndarray]:
    """Inputs by name, each (batch, SEQUENCE)."""
    ids = np.random.default_rng(0).integers(1000, 20_000, (batch, SEQUENCE))
    of = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {each.name: of.get(each.name, ids) for each in session.get_inputs()}


def main() -> None:
    """All arms."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saturation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    name = section("saturation", PAGE)
    with tempfile.TemporaryDirectory() as place:
        source = str(models.minilm(Path(place) / "minilm").folder)
        folders = {
            each: convert(
                Recipe(source=source, target="onnx", precision=Precision(name=each), accept=("cosine_loss<=1",)),
                Path(place) / each,
            )
            for each in ("fp32", "int8")
        }
        sessions = {label: opened(folders[precision], exact) for label, (precision, exact) in ARMS.items()}
        speeds: dict[tuple[str, int], list[float]] = {(label, batch): [] for label in ARMS for batch in BATCHES}
        losses: dict[tuple[str, int], float] = {}
        for batch, runs in BATCHES.items():
            inputs = feed(sessions["fp32"], batch)
            right = sessions["fp32"].run(None, inputs)[0]
            for turn in range(asked.rounds):
                for label in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                    found = sessions[label].run(None, inputs)[0]
                    losses[label, batch] = 1 - float(
                        (right * found).sum() / np.sqrt((right**2).sum() * (found**2).sum())
                    )
                    began = time.perf_counter()
                    for _ in range(runs):
                        sessions[label].run(None, inputs)
                    speeds[label, batch].append(runs * batch / (time.perf_counter() - began))
    rows = [["", *(head for batch in BATCHES for head in (f"{batch} together: 1 − cosine", "sequences/s", "×"))]]
    for label in ARMS:
        row = [label]
        for batch in BATCHES:
            values, base = speeds[label, batch], speeds["int8 as ONNX Runtime has it", batch]
            row += [f"{losses[label, batch]:.4f}", spread(values, ".0f"),
                    spread([one / of for one, of in zip(values, base, strict=True)])]  # fmt: skip
        rows.append(row)
    put(
        name,
        f"{table(rows)}\n\nMedian (range) of {asked.rounds} rounds in turns; × against the second line, of the same "
        f"round. Sequences of {SEQUENCE} tokens; the cosine is that of all hidden states together.",
        PAGE,
    )


if __name__ == "__main__":
    main()
