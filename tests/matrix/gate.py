"""Tiny models through the gates: through all of them as a user would, or through the gate after export alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightship.calibration import Text, default_text
from lightship.checkpoint import Checkpoint
from lightship.decoder_pipeline import EXACT
from lightship.errors import LimitExceeded
from lightship.evaluation import divergence, parity
from lightship.evaluation.parity import Parity
from lightship.evaluation.text import scoring_set, tokeniser
from lightship.pipeline import convert
from lightship.recipe import KLD_LIMITS, Precision, PrecisionName, Recipe
from lightship.targets import openvino, pytorch


@cache
def text() -> Text:
    """What the pipeline gates on."""
    return default_text()


def record(checkpoint: Checkpoint, folder: Path) -> divergence.Reference:
    """The gate's rows by the original, and its own rounding."""
    original = pytorch.open_scorer(checkpoint.folder)
    encode, start = tokeniser(checkpoint)
    tokens = scoring_set(text(), encode, parity.LONG, 1, start=start).sequences[0]
    return parity.record(original, parity.gate_batches(tokens, checkpoint.context_length, original.greedy), folder)


def judge(reference: divergence.Reference, checkpoint: Checkpoint, folder: Path) -> Parity:
    """Export `checkpoint` to OpenVINO and measure it as the gate after export does."""
    openvino.export(checkpoint, folder, "float32")
    return parity.parity(reference, openvino.open_scorer(folder, EXACT))


def judge_against(faulty: Checkpoint, reference: divergence.Reference, runtime: Path, folder: Path) -> Parity:
    """The two sides exchanged: the exported `runtime` is right, and `faulty` is recorded as its original, on the rows
    of `reference`. Ten times faster, and the same difference of two models."""
    wrong = divergence.record(pytorch.TorchScorer(faulty), reference.batches, folder)
    return parity.parity(wrong, openvino.open_scorer(runtime, EXACT))


def stopped(found: Parity, rounding: float | None) -> bool:
    """Whether the gate rejects a float32 export with these figures, of a model with that `rounding`."""
    try:
        parity.check_parity(found, KLD_LIMITS["fp32"], "gate export", parity.exact_error(0.0, rounding))
    except LimitExceeded:
        return True
    return False


@dataclass(frozen=True)
class Figures:
    """What the gates of one run measured: mean KLD (of embedders 1 − mean cosine) of the export and of what is
    shipped, and mean |Δ log p| as served (None for encoders)."""

    export: float
    shipped: float
    served: float | None


def through_all_gates(checkpoint: Checkpoint, target: str, precision: PrecisionName, out: Path) -> Figures:
    """Convert as `lightship convert` does, at the default limits. Raises `LimitExceeded` when a gate fails."""
    said: list[str] = []
    recipe = Recipe(source=str(checkpoint.folder), target=target, precision=Precision(name=precision))
    convert(recipe, out, progress=said.append)
    whole = "\n".join(said)
    export, shipped = map(float, re.findall(r"(?<!on )(?:mean KLD|1 − cosine) ([\d.e+-]+)", whole))
    served = re.findall(r"mean \|Δ log p\| (\S+) over", whole)
    return Figures(export, shipped, float(served[0]) if served else None)
