"""A recipe with steps, all the way to a bundle: the export must say what the lighter checkpoint says, the bundle is
measured against the original."""

from __future__ import annotations

import math

import pytest
import torch

from lightship.bundle import Bundle
from lightship.checkpoint import Checkpoint
from lightship.compression.magnitude import Magnitude
from lightship.errors import LimitExceeded, UnsupportedError
from lightship.evaluation.text import cut
from lightship.pipeline import check, convert, evaluate, plan_run, run, ship
from lightship.recipe import Precision, Recipe
from tests.tiny import tiny_encoder, tiny_llama


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("small") / "llama", max_position_embeddings=128)


def recipe(source, sparsity=0.1, **given):
    steps = [{"magnitude": {"sparsity": sparsity}}]
    return Recipe(source=str(source.folder), steps=steps, precision=Precision(name="fp32"), **given)


def test_from_recipe_to_bundle_and_back(small, tmp_path, monkeypatch):
    asked = recipe(small, limits={"kld": 0.5}, out=str(tmp_path / "bundle"))
    bundle = run(asked, runs=tmp_path / "runs")
    figures = {metric.name: metric.value for metric in bundle.report.metrics}
    assert figures["export_gate_kld"] < 1e-6 < 1e-3 < figures["gate_kld"], "exact export, and the loss of the step"
    assert figures["kld"] > 1e-3 and "flips" in figures and bundle.report.meta["limit_kld"] == 0.5
    assert bundle.manifest["source"]["digest"] == small.digest()
    assert bundle.report.meta["title"] == "llama → magnitude → fp32"
    assert all(step.done for step in plan_run(asked, runs=tmp_path / "runs").steps)
    monkeypatch.setattr(Magnitude, "change", lambda *given: pytest.fail("the step was done before"))
    assert run(asked, runs=tmp_path / "runs").digest == bundle.digest
    assert Bundle.open(bundle.folder).digest == bundle.digest


def bits_per_byte(checkpoint):
    """Of the default text in the tokens of `checkpoint`, by plain transformers, one passage at a time."""
    passages, model, total = cut(Recipe(source=""), checkpoint).score, checkpoint.load("float32"), 0.0
    for ids, marks in zip(passages.sequences, passages.masks, strict=True):
        with torch.inference_mode():
            said = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(said[at - 1, ids[at]]) for at, scored in enumerate(marks) if scored)
    return total / math.log(2) / (passages.bytes_per_token * passages.scored)


def test_a_cut_vocabulary_goes_all_the_way_and_is_measured_again(small, tmp_path):
    """Nothing is lost for the tokens that were kept: not in the gates, not when the bundle is compared once more."""
    asked = Recipe(source=str(small.folder), steps=[{"vocabulary": {"keep": 400}}], precision=Precision(name="fp32"))
    bundle = ship(asked, tmp_path / "bundle")
    runtime = Checkpoint(bundle.target_folder("openvino"))
    assert runtime.vocabulary == len(runtime.kept_tokens) == 400
    again = evaluate(bundle.folder, str(small.folder))
    for report in (bundle.report, again):
        assert next(metric.value for metric in report.metrics if metric.name == "kld") < 1e-5
        assert report.get("bits_per_byte").baseline == pytest.approx(bits_per_byte(small), rel=1e-4)
    assert check(bundle.folder, repeats=1).meta["verdict"].startswith("intact")


def test_a_shortage_is_no_error_where_it_is_to_be_ignored(small, tmp_path, monkeypatch):
    asked = recipe(small, limits={"kld": 0.5}, out=str(tmp_path / "bundle"))
    monkeypatch.setattr("lightship.step.memory_available", lambda: 10)
    with pytest.raises(UnsupportedError, match="the step magnitude needs about"):
        convert(asked, tmp_path / "runtime")
    (tmp_path / "runs" / asked.label / "x").mkdir(parents=True)
    (tmp_path / "runs" / asked.label / "x" / "done.json").touch()
    assert not any(step.done for step in plan_run(asked, runs=tmp_path / "runs").steps)
    convert(asked, tmp_path / "runtime", ignore_shortage=True)


def test_limits_hold_after_the_step_and_at_the_end(small, tmp_path):
    with pytest.raises(LimitExceeded, match="step 1 magnitude: kld"):
        convert(recipe(small, 0.5, limits={"kld": 0.01}), tmp_path / "runtime")
    with pytest.raises(LimitExceeded, match="gate openvino"):  # without limits the default of the precision holds
        convert(recipe(small, 0.5), tmp_path / "runtime")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("architecture", "name"), [
    ("BertForSequenceClassification", "kld"), pytest.param("BertModel", "cosine_loss", marks=pytest.mark.slow),
])  # fmt: skip
def test_an_encoder_goes_all_the_way(tmp_path, architecture, name):
    encoder = tiny_encoder(tmp_path / "bert", architecture)
    asked = recipe(encoder, limits={name: 0.5}, out=str(tmp_path / "bundle"), target="onnx")
    bundle = run(asked, runs=tmp_path / "runs")
    figures = {metric.name: metric.value for metric in bundle.report.metrics}
    assert figures[f"export_gate_{name}"] < 1e-6 < 1e-5 < figures[f"gate_{name}"], "exact export, the loss of the step"
    assert figures[name] > 1e-5 and bundle.report.meta[f"limit_{name}"] == 0.5
    assert bundle.manifest["source"]["digest"] == encoder.digest() and bundle.targets == ["onnx"]
    assert all(step.done for step in plan_run(asked, runs=tmp_path / "runs").steps)
    again = evaluate(bundle.folder, str(encoder.folder)).get(name)
    assert again.value == pytest.approx(figures[name], rel=0.1)
    assert check(bundle.folder, repeats=1).meta["verdict"].startswith("intact")
    with pytest.raises(LimitExceeded, match=f"step 1 magnitude: {name}"):
        convert(recipe(encoder, 0.5, limits={name: 1e-7}), tmp_path / "runtime")


def test_an_encoder_with_a_cut_vocabulary_is_measured_on_texts(tmp_path):
    """The gates compare rows of tokens, and lose nothing; the labels of a text change with how it is spelled."""
    encoder = tiny_encoder(tmp_path / "bert", "BertForSequenceClassification")
    asked = Recipe(source=str(encoder.folder), target="onnx", steps=[{"vocabulary": {"keep": 0.5}}],
                   precision=Precision(name="fp32"))  # fmt: skip
    with pytest.raises(LimitExceeded, match="evaluate onnx"):
        ship(asked, tmp_path / "never")
    bundle = ship(asked.model_copy(update={"accept": ("kld<=3",)}), tmp_path / "bundle")
    assert Checkpoint(bundle.target_folder("onnx")).vocabulary == encoder.vocabulary // 2
    assert bundle.report.get("gate_kld").value < 1e-6
    for report in (bundle.report, evaluate(bundle.folder, str(encoder.folder))):
        assert report.get("kld").value > 1e-3
