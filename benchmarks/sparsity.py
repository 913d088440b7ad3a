"""What zeros in the weights cost in quality, and that they bring no speed.

`quality`: magnitude against wanda on the demo model. `speed`: the control, the same graphs with 50 % and 90 % zeros.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import losses, models
from benchmarks.exported import HEADING, SAID, compared
from benchmarks.page import DOCS, put, section, table
from lightship.step import make_step

PAGE = DOCS / "compression.md"
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PATTERNS = ("2:4", "4:8")
ZEROS = (0.5, 0.9)
ROUNDS = 3
CHUNKS = 12


def quality(work: Path) -> None:
    """KLD, top-1 and perplexity of both steps on held-out text; wanda with three calibration sets."""
    original = models.demo(work / "demo")
    reference = losses.record_original(original, work / "reference", CHUNKS)
    options = [{"sparsity": each} for each in SPARSITIES] + [{"pattern": each} for each in PATTERNS]
    arms = {}
    for chosen in options:
        for name, seeds in (("magnitude", 1), ("wanda", losses.SEEDS)):
            found = []
            for seed in range(seeds):
                made = make_step(name, chosen).apply(original, work / "made", losses.calibration(original, seed))
                found.append(losses.measure(reference, made))
                shutil.rmtree(made.folder)
            arms[f"{name} {chosen.get('pattern') or format(chosen['sparsity'], '.0%')}"] = found
            print(losses.shown({f"{name} {chosen}": found})[1], file=sys.stderr, flush=True)
    scored = (f"{CHUNKS} held-out passages of 512 tokens, second half scored; wanda with {losses.SEEDS} calibration "
              "sets, mean (range).")  # fmt: skip
    put("sparsity quality", f"{table(losses.shown(arms))}\n\n{scored}", PAGE)


def speed(work: Path) -> None:
    """Prefill and decode of dense and sparse weights in the same rounds."""
    original = models.demo(work / "demo")
    made = {"dense": original}
    for share in ZEROS:
        step = make_step("magnitude", {"sparsity": share})
        made[f"{share:.0%} zeros"] = step.apply(original, work / f"{share}", losses.calibration(original, 0, 1))
    rows = [HEADING, *(each.cells() for each in compared(made, work, ROUNDS))]
    said = f"Median (lowest – highest) of {ROUNDS} rounds; × is against dense in the same round. {SAID}"
    put("sparsity speed", f"{table(rows)}\n\n{said}", PAGE)


PARTS: dict[str, Callable[[Path], None]] = {"quality": quality, "speed": speed}


def main() -> None:
    """One part, or both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this")
    part = parser.parse_args().part
    for name in [part] if part else PARTS:
        section(f"sparsity {name}", PAGE)
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as work:
            PARTS[name](Path(work))


if __name__ == "__main__":
    main()
