"""Architectures × targets × precisions, each through the whole gate; the short form takes four architectures.

`python -m benchmarks.matrix` prints the figures of all.
"""

import pytest

from lightship.checkpoint import Checkpoint
from lightship.errors import UnsupportedError
from lightship.recipe import KLD_LIMITS
from tests.matrix.families import EVERY, FAMILIES, make
from tests.matrix.gate import through_all_gates

SHORT = {("llama", "onnx", "int8"), ("mistral", "onnx", "int8"), ("gemma3", "openvino", "fp32"),
         ("gpt2", "openvino", "int8")}  # fmt: skip
CELLS = [(family, target, precision) for family in EVERY for target in ("openvino", "onnx")
         for precision in ("fp32", "int8") if (family, target) != ("gemma2", "openvino")]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Checkpoint] = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def test_attention_that_caps_its_scores_is_refused_by_openvino(models, tmp_path):
    with pytest.raises(UnsupportedError, match="cannot serve attention whose scores are capped"):
        through_all_gates(models("gemma2"), "openvino", "fp32", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "target", "precision"),
    [pytest.param(*cell, marks=() if cell in SHORT else pytest.mark.slow) for cell in CELLS],
)
def test_every_gate_passes(models, family, target, precision, tmp_path):
    found = through_all_gates(models(family), target, precision, tmp_path / "out")
    assert found.export <= KLD_LIMITS["fp32"]
    assert found.shipped <= KLD_LIMITS[precision]
    if precision == "int8":
        assert found.shipped > found.export  # the weights were rounded
    assert family not in FAMILIES or len(models(family).eos_token_ids) == len(FAMILIES[family].eos)
