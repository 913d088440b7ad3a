"""The mutation score of the gate: seeded faults that it stops, and clean exports that it lets through.

A fault is put into a real OpenVINO export of a tiny random model while the original stays right (`--into original`:
the reverse); a clean run is another model, drawn with another seed, exported and gated. Finished models are kept in
`--results`; a rerun goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.page import GATE, put, table
from lightship.evaluation.parity import Parity
from lightship.recipe import KLD_LIMITS
from tests.matrix.families import FAMILIES, make
from tests.matrix.faults import APPLIES, Faulty, nan
from tests.matrix.gate import judge, judge_against, record, stopped

Row = dict[str, Any]


def measure(task: tuple[str, int, bool]) -> list[Row]:
    """The clean export of one model and, for seed 0, of every fault that applies to its family: seeded into the export,
    or, when the third entry is false, into the original. NaN is always seeded into the export: an original with NaN is
    refused before any gate."""
    name, seed, into_export = task
    with tempfile.TemporaryDirectory(prefix="lightship-") as made:
        folder = Path(made)
        checkpoint = make(name, folder / "model", seed)
        reference = record(checkpoint, folder / "reference")
        rows = [row_of(name, seed, "", "export", judge(reference, checkpoint, folder / "clean"), reference.rounding)]
        for fault in (fault for fault, where in APPLIES.items() if name in where and seed == 0):
            faulty, path = Faulty(checkpoint.folder, fault), folder / fault.__name__
            if into_export or fault is nan:
                found, side = judge(reference, faulty, path), "export"
            else:
                found, side = judge_against(faulty, reference, folder / "clean", path), "original"
            rows.append(row_of(name, seed, fault.__name__, side, found, reference.rounding))
    return rows


def row_of(name: str, seed: int, fault: str, side: str, found: Parity, rounding: float | None) -> Row:
    """What is kept of one judgement."""
    print(f"{name:10} {seed:3} {fault or 'clean':18} {side:8} KLD {found.mean_kld:.1e} max {found.max_error:.1e}",
          file=sys.stderr, flush=True)  # fmt: skip
    return {"family": name, "seed": seed, "fault": fault, "side": side, "found": asdict(found),
            "rounding": rounding}  # fmt: skip


def tasks(clean: int, into_export: bool) -> list[tuple[str, int, bool]]:
    """`clean` models, the families in turn; those with seed 0 carry the faults and come first."""
    names = list(FAMILIES)
    count = max(clean, len(names))
    return [(names[number % len(names)], number // len(names), into_export) for number in range(count)]


def run(clean: int, into_export: bool, results: Path, workers: int) -> list[Row]:
    """Rows of every task; those already in `results` are not measured again."""
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["family"], row["seed"]) for row in kept}
    left = [task for task in tasks(clean, into_export) if task[:2] not in done]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=20) as pool, results.open("a") as file:
        for rows in pool.imap_unordered(measure, left):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            kept += rows
    return kept


def summary(rows: list[Row]) -> str:
    """The table: a fault a row, a family a column, mean KLD and max |Δ log p| in the cells, what was missed in bold.

    Where a fault was seeded on both sides, the table shows the export.
    """
    sides: dict[str, dict[tuple[str, str], Row]] = {"export": {}, "original": {}}
    for row in rows:
        if row["fault"]:
            sides[row["side"]][row["fault"], row["family"]] = row
    cells = {**sides["original"], **sides["export"]}
    clean = {(row["family"], row["seed"]): row for row in rows if not row["fault"]}
    lines = [["fault", *FAMILIES]]
    for fault, where in APPLIES.items():
        keys = [(fault.__name__, name) for name in FAMILIES]
        shown = [cell(cells[key], key in sides["export"]) if key in cells else "–" * (key[1] in where) for key in keys]
        lines.append([(fault.__doc__ or "").rstrip("."), *shown])
    caught = sum(map(_stopped, cells.values()))
    by_kld = sum(not row["found"]["mean_kld"] <= KLD_LIMITS["fp32"] for row in cells.values())
    both = sides["export"].keys() & sides["original"].keys()
    same = sum(_stopped(sides["export"][key]) == _stopped(sides["original"][key]) for key in both)
    said = [
        f"**{caught} of {len(cells)} faults stopped ({caught / len(cells):.1%}), {by_kld} of them by mean KLD; "
        f"{sum(map(_stopped, clean.values()))} false alarms in {len(clean)} clean runs**, each of a model with other "
        f"weights, at most mean KLD {max(row['found']['mean_kld'] for row in clean.values()):.1e} and max |Δ log p| "
        f"{max(row['found']['max_error'] for row in clean.values()):.1e}, {_roundings(clean.values()):.1f} times the "
        "original's own rounding.",
        "Cells: mean KLD (max |Δ log p|) in nats; in bold what the gate missed; –: not run; blank where the fault "
        "cannot occur.",
    ]
    if sides["original"]:
        said.append(
            "°: seeded into the recorded original, against a clean export: the same two models, the sides exchanged. "
            f"Seeded into the export itself: {len(sides['export'])}; on both sides: {len(both)}, {same} of these with "
            "the same verdict."
        )
    return "\n\n".join([*said, table(lines)])


def _stopped(row: Row) -> bool:
    return stopped(Parity(**row["found"]), row["rounding"])


def _roundings(rows: Iterable[Row]) -> float:
    """The largest max |Δ log p| in units of the rounding of its own original."""
    return max(float(row["found"]["max_error"]) / row["rounding"] for row in rows)


def cell(row: Row, exported: bool) -> str:
    """The figures of one fault in one family."""
    found = Parity(**row["found"])
    figures = f"{found.mean_kld:.0e} ({found.max_error:.0e})" if math.isfinite(found.mean_kld) else "∞"
    figures += "" if exported else "°"
    return figures if _stopped(row) else f"**{figures} missed**"


def main() -> None:
    """All faults and `--clean` clean runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description=__doc__)
    parser.add_argument("--clean", type=int, default=200, help="models that are exported without a fault")
    sides = "seed faults into the export, or (ten times faster) into the recorded original"
    parser.add_argument("--into", choices=["export", "original"], default="export", help=sides)
    parser.add_argument("--results", type=Path, default=Path("runs/mutations.jsonl"), help="what is measured already")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    put("mutations", summary(run(asked.clean, asked.into == "export", asked.results, asked.workers)), GATE)


if __name__ == "__main__":
    main()
