"""Seeded faults: the gate after export stops each, and lets the clean export through.

The short form seeds one fault of every kind; `python -m benchmarks.mutations` seeds each in every architecture where it
applies and prints the score.
"""

import pytest

from tests.matrix import faults
from tests.matrix.families import FAMILIES, make
from tests.matrix.faults import APPLIES, Faulty
from tests.matrix.gate import judge, record, stopped

SHORT = {("gemma3", "sliding_window"), ("gemma3", "rope_scaling"), ("gpt2", "dropped_bias"), ("gpt2", "left_padding"),
         ("gpt2", "head")}  # fmt: skip
PAIRS = [(family, fault.__name__) for family in FAMILIES for fault, where in APPLIES.items() if family in where]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """(checkpoint, its recorded reference), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = make(name, folder / "model")
            made[name] = checkpoint, record(checkpoint, folder / "reference")
        return made[name]

    return get


@pytest.mark.parametrize(
    ("family", "fault"),
    [pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.slow) for pair in PAIRS],
)
def test_a_faulty_export_is_stopped(originals, family, fault, tmp_path):
    checkpoint, reference = originals(family)
    found = judge(reference, Faulty(checkpoint.folder, getattr(faults, fault)), tmp_path / "export")
    assert stopped(found), found


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.slow) for name in FAMILIES]
)
def test_a_clean_export_passes(originals, family, tmp_path):
    checkpoint, reference = originals(family)
    found = judge(reference, checkpoint, tmp_path / "export")
    assert not stopped(found), found
