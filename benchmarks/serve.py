"""Served against in-process: tokens/s at 1, 16 and 64 clients, times to the first token, time until ready, memory.

Both arms with the same settings and requests, in turns; see `benchmarks.arms`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.arms import ISAS, Arms, Served, masked, pieces, tokens_of, tuned
from benchmarks.load import Load, Run
from benchmarks.page import put, section, spread, table
from lightship.bundle import Bundle
from lightship.engine import EngineSettings

IN, OUT = 200, 64
REQUESTS = {1: 24, 16: 96, 64: 192}  # measured, for so many clients


def compared(
    bundle: Bundle, clients: int, repeats: int, port: int, settings: EngineSettings | None
) -> tuple[list[str], list[Served]]:
    """A row of the table, and the runs of the server."""
    served, bare = list[Served](), list[Run]()
    rows = pieces(tokens_of(bundle), IN, clients + REQUESTS[clients])
    with tempfile.TemporaryDirectory() as name:
        arms = Arms(bundle, Path(name), Load(rows[:clients], rows[clients:], OUT, clients), settings)
        for repeat in range(repeats):
            served.append(arms.served(port + repeat))
            bare.append(arms.in_process(served[-1].run))
            for run in (served[-1].run, bare[-1]):
                print(f"{clients} clients: {run.rate:.1f} tokens/s, TTFT {1000 * run.middle('ttft'):.0f} ms, "
                      f"TPOT {1000 * run.middle('tpot'):.1f} ms", file=sys.stderr)  # fmt: skip
    pairs = [(one.run, other) for one, other in zip(served, bare, strict=True)]
    row = [str(clients), spread([run.rate for run, _ in pairs], ".1f"), spread([run.rate for run in bare], ".1f"),
           spread([run.rate / other.rate for run, other in pairs], ".3f")]  # fmt: skip
    for name in ("ttft", "tpot"):
        form = ".0f" if name == "ttft" else ".1f"
        row += [spread([1000 * run.middle(name) for run, _ in pairs], form),
                spread([1000 * run.middle(name) for run in bare], form)]  # fmt: skip
        if name == "ttft":
            row.append(spread([1000 * (run.middle(name) - other.middle(name)) for run, other in pairs], "+.1f"))
    return row, served


def main() -> None:
    """All loads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--tuned", action="store_true", help="with what `lightship tune` found for the bundle")
    parser.add_argument("--isa", choices=ISAS, help="the newest instructions that oneDNN may use")
    parser.add_argument("--port", type=int, default=18_100)
    asked = parser.parse_args()
    name = section("serve" + " --tuned" * asked.tuned + masked(asked.isa))
    bundle = Bundle.open(asked.bundle)
    settings, said = tuned(bundle) if asked.tuned else (None, "untuned")
    rows = [["clients", "tokens/s served", "in process", "ratio", "TTFT p50 served, ms", "in process", "difference",
             "TPOT p50 served, ms", "in process"]]  # fmt: skip
    served = list[Served]()
    for clients in asked.clients:
        row, found = compared(bundle, clients, asked.repeats, asked.port + 100 * clients, settings)
        rows.append(row)
        served += found if clients == asked.clients[0] else []  # many requests fill the KV cache up to its own limit
    sizes = [one.memory / 1e6 for one in served]
    own = bundle.size_bytes / 1e6
    put(
        name,
        f"{table(rows)}\n\nEngine: {said}. {IN} tokens in, {OUT} out, greedy; median (range) of {asked.repeats} pairs. "
        f"Ready after {spread([one.ready for one in served])} s (n = {len(served)}). Memory of all processes after one "
        f"request a client (PSS; {asked.clients[0]} client): {spread(sizes, '.0f')} MB, the bundle's {own:.0f} MB and "
        f"{spread([size - own for size in sizes], '.0f')} MB; the KV cache then grows with use up to its limit "
        "(1 GiB by default).",
    )


if __name__ == "__main__":
    main()
