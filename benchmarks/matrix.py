"""Every architecture × target × precision through all gates, on tiny random models: what the gates measured.

Finished cells are kept in `--results`; a rerun goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.page import GATE, put, table
from lightship.errors import LimitExceeded, UnsupportedError
from lightship.recipe import KLD_LIMITS, PrecisionName
from tests.matrix.families import FAMILIES, make
from tests.matrix.gate import through_all_gates

TARGETS = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
PRECISIONS: tuple[PrecisionName, ...] = ("int8", "fp32")
Row = dict[str, Any]


def measure(name: str, target: str, precision: PrecisionName) -> Row:
    """One cell: the figures, or what was said instead."""
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


def run(results: Path) -> list[Row]:
    """Rows of all cells, those already in `results` not measured again."""
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["family"], row["target"], row["precision"]) for row in kept}
    with results.open("a") as file:
        for precision in PRECISIONS:
            for target in TARGETS:
                for name in FAMILIES:
                    if (name, target, precision) not in done:
                        kept.append(measure(name, target, precision))
                        file.write(json.dumps(kept[-1]) + "\n")
                        file.flush()
    return kept


def summary(rows: list[Row]) -> str:
    """A family a row; a target and precision a column. A cell that was not run is a dash."""
    columns = [(target, precision) for target in TARGETS for precision in reversed(PRECISIONS)]
    cells = {(row["family"], row["target"], row["precision"]): cell(row) for row in rows}
    head = ["architecture", "tokenizer", "head", "EOS ids", *(f"{TARGETS[target]} {name}" for target, name in columns)]
    lines = [head]
    for name, family in FAMILIES.items():
        about = [name, family.tokenizer, "tied" if family.tied else "untied", str(len(family.eos))]
        lines.append([*about, *(cells.get((name, *column), "–") for column in columns)])
    return (
        f"{table(lines)}\n\nMean KLD in nats per token of what is shipped (mean |Δ log p| as served); –: not run. "
        f"Limits on mean KLD: {KLD_LIMITS['fp32']:g} for fp32 and for every export, {KLD_LIMITS['int8']:g} for int8."
    )


def cell(row: Row) -> str:
    """One figure, or why there is none."""
    if "refused" in row:
        return "refused"
    return "**stopped**" if "failed" in row else f"{row['shipped']:.0e} ({row['served']:.0e})"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("runs/matrix.jsonl"), help="what is measured already")
    asked = parser.parse_args()
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    put("matrix", summary(run(asked.results)), GATE)


if __name__ == "__main__":
    main()
