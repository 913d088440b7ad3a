"""Every architecture × target × precision through all gates, on tiny random models: what the gates measured.

Finished cells are kept in `--results`; a rerun goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.page import GATE, put, table
from lightship.errors import LimitExceeded, UnsupportedError
from lightship.recipe import COSINE_LIMITS, KLD_LIMITS, PrecisionName
from tests.matrix.families import ENCODERS, EVERY, FAMILIES, make
from tests.matrix.gate import through_all_gates

TARGETS = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
PRECISIONS: tuple[PrecisionName, ...] = ("int8", "fp32")
Row = dict[str, Any]


def measure(asked: tuple[str, str, PrecisionName]) -> Row:
    """One cell: the figures, or what was said instead."""
    name, target, precision = asked
    row: Row = {"family": name, "target": target, "precision": precision}
    with tempfile.TemporaryDirectory(prefix="lightship-") as made:
        folder = Path(made)
        try:
            row |= asdict(through_all_gates(make(name, folder / "model"), target, precision, folder / "out"))
        except UnsupportedError as error:
            row["refused"] = str(error)
        except LimitExceeded as error:
            row["failed"] = str(error)
    print(row, file=sys.stderr, flush=True)
    return row


def run(results: Path, workers: int) -> list[Row]:
    """Rows of all cells, those already in `results` not measured again."""
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["family"], row["target"], row["precision"]) for row in kept}
    cells = [(name, target, precision) for precision in PRECISIONS for target in TARGETS for name in EVERY]
    left = [cell for cell in cells if cell not in done]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=10) as pool, results.open("a") as file:
        for row in pool.imap_unordered(measure, left):
            file.write(json.dumps(row) + "\n")
            file.flush()
            kept.append(row)
    return kept


def summary(rows: list[Row]) -> str:
    """A family a row; a target and precision a column. A cell that was not run is a dash."""
    columns = [(target, precision) for target in TARGETS for precision in reversed(PRECISIONS)]
    cells = {(row["family"], row["target"], row["precision"]): cell(row) for row in rows}
    head = ["architecture", "tokenizer", "head", "EOS ids", *(f"{TARGETS[target]} {name}" for target, name in columns)]
    lines = [head]
    for name in EVERY:
        about = [name, "wordpiece" if name in ENCODERS else "unigram", "", ""]
        if name in FAMILIES:
            family = FAMILIES[name]
            about = [name, family.tokenizer, "tied" if family.tied else "untied", str(len(family.eos))]
        lines.append([*about, *(cells.get((name, *column), "–") for column in columns)])
    return (
        f"{table(lines)}\n\nMean KLD of what is shipped, in nats per token (encoders: per text; embedders: 1 − mean "
        "cosine), and mean |Δ log p| as served; –: not run. Limits on mean KLD: "
        f"{KLD_LIMITS['fp32']:g} for fp32 and for every export, {KLD_LIMITS['int8']:g} for int8; on 1 − mean "
        f"cosine {COSINE_LIMITS['fp32']:g} and {COSINE_LIMITS['int8']:g}."
    )


def cell(row: Row) -> str:
    """One figure, or why there is none."""
    if "refused" in row:
        return "refused"
    if "failed" in row:
        return "**stopped**"
    return f"{row['shipped']:.0e}" + ("" if row["served"] is None else f" ({row['served']:.0e})")


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("runs/matrix.jsonl"), help="what is measured already")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    put("matrix", summary(run(asked.results, asked.workers)), GATE)


if __name__ == "__main__":
    main()
