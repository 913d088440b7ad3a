"""Seeded faults: the gate after export stops each, and lets the clean export through.

The short form seeds a few; `python -m benchmarks.mutations` seeds each in every architecture where it
applies and prints the score.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lightship.checkpoint import Checkpoint
from lightship.evaluation.divergence import Reference
from lightship.evaluation.parity import Parity
from tests.matrix import faults
from tests.matrix.families import FAMILIES, make
from tests.matrix.faults import APPLIES, Faulty
from tests.matrix.gate import judge, judge_against, record, stopped

SHORT = {("gemma3", "rope_scaling"), ("gpt2", "dropped_bias"), ("gpt2", "norm_epsilon"), ("gpt2", "head")}
BOTH = ("gemma3", "gpt2")  # their faults are seeded on both sides
EXPORTED = {("gpt2", "left_padding"), ("gemma3", "sliding_window")}
MISSED = {("gemma2", "norm_epsilon"): "beside embeddings scaled by 8 an epsilon of 1e-5 is as small as rounding"}
APPLICABLE = [(family, fault.__name__) for family in FAMILIES for fault, where in APPLIES.items() if family in where]
PAIRS = [pair for pair in APPLICABLE if pair[1] != "nan"]  # an original with NaN is refused before any gate
CROSS = [pair for pair in APPLICABLE if pair[1] == "nan" or pair[0] in BOTH]


def slow(where):
    """The mark of what is not in the short form."""
    return [pytest.mark.slow] if where else []


def marks(pair):
    """Slow unless in the short form; what the gate is known to miss must stay missed, or be struck off."""
    missed = [pytest.mark.xfail(strict=True, reason=MISSED[pair])] if pair in MISSED else []
    return slow(pair not in SHORT) + missed


@dataclass(frozen=True)
class Clean:
    """A model, its recorded reference and its right export."""

    checkpoint: Checkpoint
    reference: Reference
    runtime: Path
    found: Parity


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The clean export of a family, made once."""
    made: dict[str, Clean] = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = make(name, folder / "model")
            reference = record(checkpoint, folder / "reference")
            found = judge(reference, checkpoint, folder / "runtime")
            made[name] = Clean(checkpoint, reference, folder / "runtime", found)
        return made[name]

    return get


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=slow(name not in ("gemma3", "gpt2"))) for name in FAMILIES]
)
def test_a_clean_export_passes(clean, family):
    right = clean(family)
    assert not stopped(right.found, right.reference.rounding), (right.found, right.reference.rounding)


@pytest.mark.parametrize(("family", "fault"), [pytest.param(*pair, marks=marks(pair)) for pair in PAIRS])
def test_a_fault_is_stopped(clean, family, fault, tmp_path):
    """Seeded into the recorded original, the export being right: the same difference, ten times faster to make."""
    right = clean(family)
    faulty = Faulty(right.checkpoint.folder, getattr(faults, fault))
    found = judge_against(faulty, right.reference, right.runtime, tmp_path)
    assert stopped(found, right.reference.rounding), found


@pytest.mark.parametrize(("family", "fault"), [pytest.param(*pair, marks=slow(pair not in EXPORTED)) for pair in CROSS])
def test_a_faulty_export_is_stopped(clean, family, fault, tmp_path):
    """Seeded where it would happen."""
    right = clean(family)
    found = judge(right.reference, Faulty(right.checkpoint.folder, getattr(faults, fault)), tmp_path / "export")
    assert stopped(found, right.reference.rounding), found
