"""Checkpoints exported and measured against one another: every arm once in each round, the ratios within a round."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.evaluation.speed import once
from lightship.find import find
from lightship.recipe import Precision

PROMPT, NEW, TIMES = 256, 64, 3


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one arm in one round."""

    prefill: float
    decode: float


def export(checkpoint: Checkpoint, folder: Path, target: str, precision: str) -> Path:
    """The runtime folder of `checkpoint` for `target`, at `fp32` or `int8`, no gates."""
    module, asked = find("targets", target), Precision(name=precision)
    plain = folder / "plain"
    module.export(checkpoint, plain, "float32")
    made = plain
    if precision != "fp32":
        made = folder / precision
        module.quantise(plain, made, asked)
        shutil.rmtree(plain)
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


def ratios(arm: Sequence[Speed], base: Sequence[Speed], name: str) -> list[float]:
    """`name` (`prefill`, `decode`) of `arm` by that of `base`, round by round."""
    return [getattr(one, name) / getattr(other, name) for one, other in zip(arm, base, strict=True)]
