"""The time to the first token with 1 000 tokens of the prompt in the prefix cache, and without.

One client of one server asks in turns: prompts that begin with the same 1 000 tokens, and prompts of the same length
of which nothing was seen before.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from benchmarks.arms import ISAS, masked, pieces, server, tokens_of
from benchmarks.load import Load, Run, generate
from benchmarks.page import put, section, spread, table
from lightship.bundle import Bundle

SHARED, OWN, OUT = 1000, 32, 8  # tokens


def load(ids: list[int], turns: int) -> Load:
    """Known and new beginnings in turns; the first of the known ones is the warm-up."""
    prefix, own = ids[:SHARED], pieces(ids[SHARED:], OWN, turns + 1)
    new = pieces(ids[SHARED + OWN :], SHARED + OWN, turns)
    rows = [row for known, other in zip(own[1:], new, strict=True) for row in (prefix + known, other)]
    return Load([prefix + own[0], new[0][::-1]], rows, OUT, clients=1)


async def measured(url: str, asked: Load) -> Run:
    """The warm-up, then all."""
    await generate(url, asked.warming)
    return await generate(url, asked)


def main() -> None:
    """One server, all turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("bundles/demo-int8"))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--isa", choices=ISAS, help="the newest instructions that oneDNN may use")
    parser.add_argument("--port", type=int, default=19_000)
    asked = parser.parse_args()
    name = section("prefix" + masked(asked.isa))
    bundle = Bundle.open(asked.bundle)
    with server(bundle.folder, asked.port, "--untuned") as (url, _, _):
        run = asyncio.run(measured(url, load(tokens_of(bundle), asked.turns)))
    times = [1000 * (each or float("nan")) for each in run.ttft]
    known, new = times[::2], times[1::2]
    rows = [
        ["TTFT known, ms", "TTFT new, ms", "known / new"],
        [spread(known, ".0f"), spread(new, ".0f"), spread([a / b for a, b in zip(known, new, strict=True)], ".3f")],
    ]
    put(
        name,
        f"{table(rows)}\n\n{SHARED} + {OWN} tokens in; median (range) of {asked.turns} turns, which have a ratio each.",
    )


if __name__ == "__main__":
    main()
