"""Time and peak memory from a checkpoint to a gated int8 folder: lightship and the bare calls, a process each.

Ours does more than the bare calls: it computes the original, compares three times and writes the tokenizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import models
from benchmarks.page import put, spread, table
from lightship.checkpoint import Checkpoint

TITLES = {"demo": "SmolLM2-135M-Instruct", "llama": "random llama, 1.24 B"}


@dataclass(frozen=True)
class Used:
    """What a command used, by the kernel's own account: watching it from outside would slow it down."""

    seconds: float
    peak_rss: int


def timed(command: list[str]) -> Used:
    """Run it; a failure ends the benchmark."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        used = Used(time.monotonic() - began, usage.ru_maxrss * 1024)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command} failed:\n{said.read().decode(errors='replace')[-3000:]}")
    print(f"{used.seconds:7.1f} s  {used.peak_rss / 1e9:5.2f} GB  {command[2]}", file=sys.stderr)
    return used


def measure(checkpoint: Checkpoint, work: Path, repeats: int) -> list[list[str]]:
    """Rows of the table: seconds and peak memory of both arms in turn, and the ratio pair by pair."""
    ours, bare = [], []
    for _ in range(repeats):
        for folder in ("bare", "ours"):
            shutil.rmtree(work / folder, ignore_errors=True)
        bare.append(timed([sys.executable, "-m", "benchmarks.bare", str(checkpoint.folder), str(work / "bare")]))
        ours.append(
            timed([sys.executable, "-m", "lightship", "convert", str(checkpoint.folder), "-o", str(work / "ours")])
        )
    size = checkpoint.weight_bytes
    ratios = [one.seconds / other.seconds for one, other in zip(ours, bare, strict=True)]
    rows = []
    for name, arm in (("bare calls", bare), ("lightship convert", ours)):
        peak = max(used.peak_rss for used in arm)
        rows.append([name, spread([used.seconds for used in arm], ".1f"), f"{peak / 1e9:.2f} GB = {peak / size:.2f} ×"])
    rows.append(["ratio", spread(ratios), f"checkpoint {size / 1e9:.2f} GB of {checkpoint.dtype}"])
    return rows


def main() -> None:
    """One model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ship", description=__doc__)
    parser.add_argument("model", choices=["demo", "llama"], help="SmolLM2-135M-Instruct, or a random llama of 1.24 B")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        work = Path(name)
        checkpoint = models.demo(work / "demo")
        if asked.model == "llama":
            checkpoint = models.random_llama(work / "llama", checkpoint.folder)
        head = [TITLES[asked.model], f"seconds, median of {asked.repeats} (range)", "peak memory (largest RSS)"]
        text = table([head, *measure(checkpoint, work, asked.repeats)])
    put(f"ship {asked.model}", text)


if __name__ == "__main__":
    main()
