"""Cut models in the runtimes: every gate compares them with the checkpoint, the served path's among them."""

from __future__ import annotations

import pytest

from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from lightship.step import make_step
from tests.compression.context import context
from tests.tiny import tiny_llama

CUTS = {
    "depth": ("depth", {"layers": "1"}),
    "width": ("width", {"mlp": 0.7, "heads": 0.5, "multiple": 16}),
    "layers that differ": ("width", {"mlp": 0.7, "heads": 0.75, "multiple": 16, "uniform": False}),
}


@pytest.mark.parametrize("target", ["openvino", "onnx"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_model_passes_every_gate(tmp_path, cut, target):
    checkpoint = tiny_llama(tmp_path / "model", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    name, options = CUTS[cut]
    made = make_step(name, options).apply(checkpoint, tmp_path / "cut", context(checkpoint))
    if cut == "layers that differ":
        assert len({each["num_key_value_heads"] for each in made.structure.layers}) > 1
    recipe = Recipe(source=str(made.folder), target=(target,), precision=Precision(name="fp32"))
    assert convert(recipe, tmp_path / "runtime").is_dir()
