"""Activations in integers, rounded for each token: what a text gets does not depend on those beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightship.encoder import Encoder, row_of
from lightship.errors import UnsupportedError
from lightship.find import find
from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from tests import processor
from tests.tiny import tiny_encoder

TEXTS = ("short", "a text of several words, longer than the first")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("bert") / "model", "BertModel", hidden_size=64, intermediate_size=128)


def outputs(target, folder, texts):
    """The pooled embeddings of `texts` in one batch."""
    encoder, engine = Encoder.load(folder), find("targets", target).open_encoder(folder)
    batch = encoder.pad_rows(row_of(encoder.encode(text)) for text in texts)
    found = encoder.meaning(engine.run(batch.ids, batch.mask, batch.types), batch.mask)
    engine.close()
    return found


def beside(target, folder):
    """How far the first text's embedding moves when the second is computed with it."""
    alone, together = (outputs(target, folder, texts)[0] for texts in (TEXTS[:1], TEXTS))
    return float(np.abs(alone - together).max())


@pytest.mark.parametrize("target", [pytest.param("openvino", marks=processor.vnni), "onnx"])
def test_each_token_is_rounded_by_itself(bert, tmp_path, target):
    made = {}
    for activations in ("auto", "int8"):
        precision = Precision(
            name="int8", arithmetic="f32" if target == "openvino" else "auto", activations=activations
        )
        recipe = Recipe(source=str(bert.folder), target=target, precision=precision, accept=("cosine_loss<=1",))
        made[activations] = convert(recipe, tmp_path / activations)
    said = json.loads((made["int8"] / "engine.json").read_text())
    assert (
        said["settings"]["dynamic_quantisation_group"] == 32
        if target == "openvino"
        else said["activations"] == "8 bits"
    )
    exact, rounded = (outputs(target, made[name], TEXTS) for name in ("auto", "int8"))
    assert np.abs(exact - rounded).max() > 1e-4, "the option would do nothing"
    assert (exact * rounded).sum() / np.sqrt((exact**2).sum() * (rounded**2).sum()) > 0.99
    assert beside(target, made["int8"]) < 1e-5
    if target == "onnx":  # one scale for a whole call
        assert beside(target, made["auto"]) > 1e-4


def test_sums_of_products_do_not_saturate(bert, tmp_path):
    """Without VNNI x64 adds pairs in 16 bits: the loss of such models was 0.007 to 0.017. With VNNI it can't fail."""
    made = {}
    for name in ("fp32", "int8"):
        recipe = Recipe(
            source=str(bert.folder), target="onnx", precision=Precision(name=name), accept=("cosine_loss<=1",)
        )
        made[name] = convert(recipe, tmp_path / name)
    exact, rounded = (outputs("onnx", made[name], TEXTS) for name in ("fp32", "int8"))
    assert (exact * rounded).sum() / np.sqrt((exact**2).sum() * (rounded**2).sum()) > 0.998


def test_floats_and_integers_at_once_are_refused(bert, tmp_path):
    precision = Precision(name="int8", activations="int8", arithmetic="f32")
    with pytest.raises(UnsupportedError):
        convert(Recipe(source=str(bert.folder), target="onnx", precision=precision), tmp_path / "out")
