"""What the precision says is what the graph holds: bits, groups, tables, the file's size."""

import json

import numpy as np
import openvino
import pytest
from pydantic import ValidationError

from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import UnsupportedError
from lightship.layers import weight_of
from lightship.recipe import Precision
from lightship.targets import openvino as target
from lightship.targets._sensitivity import body, key_of
from tests.tiny import tiny_gpt2, tiny_llama

ROWS = np.random.default_rng(0).integers(4, 500, (16, 128)).tolist()
PLAIN = {"name": "int4", "group_size": 32, "fit": False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    checkpoint = tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=256, head_dim=64, intermediate_size=512)
    folder = tmp_path_factory.mktemp("runtime")
    target.export(checkpoint, folder, "float32")
    return checkpoint, folder


def quantised(exported, folder, **options):
    target.quantise(exported[1], folder, Precision(**options), ROWS, exported[0])
    target.finish(folder, Precision(**options))
    return folder


def stored(folder):
    """(bits, shape) of every constant of integers with two axes or more, and the model's weights in each."""
    found = []
    for node in openvino.Core().read_model(folder / target.GRAPH).get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            kind = node.get_element_type()
            if kind in (openvino.Type.i4, openvino.Type.i8):
                found.append((kind.bitwidth, tuple(node.shape)))
    return found


def logits(folder):
    ids = np.array(ROWS[:2])
    return target.open_scorer(folder, EngineSettings(inference_precision="f32", kv_precision="f32")).logits(
        ids, np.ones_like(ids)
    )


OPTIONS = [dict(zip(("awq", "scale_estimation", "gptq"), map(bool, (number & 1, number & 2, number & 4)), strict=True))
           for number in range(8)]  # fmt: skip


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"fit": True}], ids=lambda options: "+".join(filter(options.get, options)) or "rtn"
)
def test_every_combination_gives_int4(exported, tmp_path, options, request):
    """The body in int4 in groups, the table in int8, once; and no two of them are the same weights."""
    folder = quantised(exported, tmp_path, **{**PLAIN, **options})
    bits = sorted(bits for bits, _ in stored(folder))
    assert bits == [4] * 14 + [8]
    assert all(shape[1:] and shape[-1] == 32 for bits, shape in stored(folder) if bits == 4)
    seen = request.config.stash.setdefault(SEEN, {})
    ours = logits(folder)
    assert np.isfinite(ours).all()
    assert not any(np.array_equal(ours, other) for other in seen.values())
    seen[str(options)] = ours


SEEN = pytest.StashKey[dict[str, np.ndarray]]()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_have_a_precision_of_their_own(tmp_path, name, tied):
    """A tied table is stored once at either."""
    checkpoint = tiny_llama(tmp_path / "model", hidden_size=128, head_dim=32, tie_word_embeddings=tied)
    target.export(checkpoint, tmp_path / "fp32", "float32")
    options = PLAIN if name == "int4" else {"name": "int8"}
    sizes = {}
    for tables in ("int8", "int4"):
        folder = quantised((checkpoint, tmp_path / "fp32"), tmp_path / tables, **{**options, "tables": tables})
        sizes[tables] = folder.joinpath("openvino_model.bin").stat().st_size
        widths = [bits for bits, shape in stored(folder) if shape[0] == checkpoint.vocabulary]
        assert widths == [int(tables[-1])] * (1 if tied else 2)
    weights = checkpoint.vocabulary * 128 * (1 if tied else 2)
    scales = 2 * weights * (1 / 32 - 1 / 64) if name == "int4" else 0
    assert sizes["int8"] - sizes["int4"] == pytest.approx(weights / 2 - scales, rel=0.01)


def test_fitted_integers_are_stored_as_they_are(exported, tmp_path):
    """What the graph computes with is what was fitted, to the float16 of the product."""
    from lightship.targets._fitting import fit

    checkpoint, _ = exported
    folder = quantised(exported, tmp_path, **{**PLAIN, "fit": True})
    model = checkpoint.load("float32")
    fitted = fit(model, ROWS, 32)
    graph = openvino.Core().read_model(folder / target.GRAPH)
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    found = []
    for node in products[:-1]:
        weights = openvino.Model([node.input_value(1)], [])
        found += list(openvino.compile_model(weights, "CPU", exact)([]).values())
    for module in body(model).values():
        expected = fitted[key_of(weight_of(module).numpy())].weights()
        assert any(each.shape == expected.shape and np.allclose(each, expected, rtol=2**-9) for each in found)


@pytest.mark.parametrize("fit", [False, True], ids=["nncf", "fit"])
def test_a_budget_is_kept(exported, tmp_path, fit):
    """Bits per weight over the whole graph, description included; what stays in int8 is what int4 hurts most."""
    checkpoint, _ = exported
    weights = checkpoint.load().num_parameters()
    sizes = {}
    for label, options in {"int8": {"name": "int8"}, "int4": PLAIN}.items():
        folder = quantised(exported, tmp_path / label, **options)
        sizes[label] = sum(path.stat().st_size for path in folder.glob("openvino_model.*"))
    half = (sizes["int8"] + sizes["int4"]) / 2 * 8 / weights
    folder = quantised(exported, tmp_path / "mixed", **{**PLAIN, "bits": half, "fit": fit})
    assert sum(path.stat().st_size for path in folder.glob("openvino_model.*")) * 8 / weights <= half
    assert {bits for bits, shape in stored(folder) if shape[0] != checkpoint.vocabulary} == {4, 8}


def test_a_budget_that_cannot_be_kept_is_an_error(exported, tmp_path):
    with pytest.raises(UnsupportedError, match="raise `bits`"):
        quantised(exported, tmp_path, **PLAIN, bits=4)
    with pytest.raises(UnsupportedError, match="original model"):
        target.quantise(exported[1], tmp_path, Precision(**PLAIN, bits=8), ROWS)


def test_gpt2_is_fitted_too(tmp_path):
    """Its matrices lie the other way round, and its positions are a table."""
    checkpoint = tiny_gpt2(tmp_path / "model")
    target.export(checkpoint, tmp_path / "fp32", "float32")
    folder = quantised((checkpoint, tmp_path / "fp32"), tmp_path / "int4", **{**PLAIN, "fit": True})
    assert sorted(bits for bits, _ in stored(folder)) == [4] * 8 + [8, 8]
    assert np.isfinite(logits(folder)).all()


@pytest.mark.parametrize("kv", ["u8", "u4", "f32"])
def test_keys_and_values_have_a_precision(exported, tmp_path, kv):
    """It is recorded, and the engine that serves is opened with it."""
    arithmetic = "f32" if kv == "f32" else "auto"
    folder = quantised(exported, tmp_path, name="int8", kv=kv, arithmetic=arithmetic)
    assert json.loads((folder / "engine.json").read_text())["settings"]["kv_precision"] == kv
    assert target.properties(folder, EngineSettings())["KV_CACHE_PRECISION"] == kv
    engine = target.open(folder, EngineSettings(prefix_cache=False))
    try:
        engine.submit(ROWS[0], GenerationParams(max_tokens=2))
        assert sum(len(event.token_ids) for _ in range(4) for event in engine.step()) == 2
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv": "f32"}, "keys and values in f32 need arithmetic f32"),
        ({"kv": "bf16", "arithmetic": "f32"}, "keys and values in bf16 need arithmetic auto"),
        ({"bits": 5.0}, "bits changes nothing at int8"),
        ({"name": "bf16", "tables": "int4"}, "tables changes nothing at bf16"),
        ({"name": "int4", "bits": 5.0, "ratio": 0.5}, "leave it out beside bits or fit"),
        ({"name": "int4", "fit": True, "gptq": True}, "leave out gptq"),
        ({"name": "bf16", "activations": "int8"}, "activations changes nothing at bf16"),
        ({"name": "int4", "bits": 3.0}, "greater than or equal to 4"),
        ({"name": "int4", "all_layers": True, "tables": "int4"}, "the older name"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValidationError, match=says):
        Precision(**options)


def test_recipes_of_the_first_version_are_read():
    assert Precision(name="int4", all_layers=True) == Precision(name="int4", tables="int4")
    assert Precision(name="int8", all_layers=False) == Precision(name="int8")
    assert Precision(name="int8", awq=True, scale_estimation=True) == Precision(name="int8")  # the default then
    stored = Precision.model_validate({"name": "int4", "awq": True, "scale_estimation": True, "gptq": False})
    assert stored.awq and stored.scale_estimation and not stored.fit


def test_matrices_are_fitted_unless_another_way_is_asked_for():
    assert Precision(name="int4").fit and Precision(name="int4", bits=6.0).fit
    assert not any(Precision(name="int4", **{name: True}).fit for name in ("awq", "scale_estimation", "gptq"))
    assert not Precision(name="int4", ratio=0.5).fit
    assert not Precision(name="int8").data_aware and not Precision(name="int4", fit=False).data_aware
