"""Checkpoints exported and measured against one another: every arm once in each round, the ratios within a round."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.page import spread
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.evaluation.memory import artefact_bytes
from lightship.evaluation.speed import once
from lightship.find import find
from lightship.recipe import Precision

PROMPT, NEW, TIMES = 256, 64, 3


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one arm in one round."""

    prefill: float
    decode: float


def finished(plain: Path, folder: Path, target: str, precision: str) -> Path:
    """The runtime folder at `fp32` or `int8` of what is exported in `plain`, no gates."""
    module, asked = find("targets", target), Precision(name=precision)
    made = plain
    if precision != "fp32":
        made = folder
        module.quantise(plain, made, asked)
    module.finish(made, asked)
    return made


def rounds(folders: Mapping[str, Path], target: str, count: int) -> dict[str, list[Speed]]:
    """Each arm opened anew in each round; its speeds are the median of `TIMES` requests after one to warm up."""
    found: dict[str, list[Speed]] = {label: [] for label in folders}
    random = np.random.default_rng()  # no prompt may be found in a prefix cache
    for number in range(count):
        for label, folder in folders.items():
            engine = find("targets", target).open(folder, EngineSettings())
            bound = int(engine.stats()["vocabulary"])
            times = [once(engine, random.integers(0, bound, PROMPT).tolist(), NEW) for _ in range(TIMES + 1)][1:]
            engine.close()
            first, rest = (statistics.median(column) for column in zip(*times, strict=True))
            found[label].append(Speed(PROMPT / first, (NEW - 1) / rest))
            print(f"{target}, round {number + 1}: {label} {found[label][-1]}", file=sys.stderr, flush=True)
    return found


@dataclass(frozen=True)
class Timed:
    """An arm in one runtime: bytes of its folder, its speeds, and those of the arm it is compared with."""

    runtime: str
    arm: str
    size: int
    speeds: Sequence[Speed]
    base: Sequence[Speed]

    def cells(self) -> list[str]:
        """Under `HEADING`."""
        found = [self.runtime, self.arm, f"{self.size / 1e6:.1f}"]
        for name in ("prefill", "decode"):
            found += [spread([getattr(each, name) for each in self.speeds], ".1f"), spread(self.ratios(name))]
        return found

    def ratios(self, name: str) -> list[float]:
        """`name` (`prefill`, `decode`) by that of the base, round by round."""
        return [getattr(one, name) / getattr(other, name) for one, other in zip(self.speeds, self.base, strict=True)]


HEADING = ["", "", "MB", "prefill, tokens/s", "×", "decode, tokens/s", "×"]
SAID = f"{PROMPT} prompt tokens, {NEW - 1} timed new ones, one request at a time."


OPENVINO = (("openvino", "fp32"), ("openvino", "int8"))
RUNTIMES = (*OPENVINO, ("onnx", "int8"))


def compared(
    arms: Mapping[str, Checkpoint], work: Path, count: int, runtimes: Sequence[tuple[str, str]] = RUNTIMES
) -> Iterator[Timed]:
    """Every arm in every runtime (target, precision), against the first arm in the same round."""
    first = next(iter(arms))
    for target in dict.fromkeys(name for name, _ in runtimes):
        plain = {label: work / "plain" / label for label in arms}
        for label, each in arms.items():
            find("targets", target).export(each, plain[label], "float32")
        for precision in (precision for name, precision in runtimes if name == target):
            made = work / "runtime"
            folders = {label: finished(plain[label], made / label, target, precision) for label in arms}
            found = rounds(folders, target, count)
            for label, speeds in found.items():
                yield Timed(f"{target} {precision}", label, artefact_bytes(folders[label]), speeds, found[first])
            shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(work / "plain")
