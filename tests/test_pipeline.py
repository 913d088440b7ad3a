"""The whole way on a tiny model: what is shipped, what is refused, what is left behind."""

import json
import os
import shutil

import numpy as np
import pytest

from lightship.bundle import Bundle
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UsageError
from lightship.evaluation.replay import bucketed
from lightship.pipeline import check, convert, ship
from lightship.recipe import Precision, Recipe, parse_accepts
from lightship.targets.openvino import properties


def test_ship_measures_and_seals(bundle_path, llama):
    bundle = Bundle.open(bundle_path)
    metrics = {metric.name: metric for metric in bundle.report.metrics}
    assert metrics["kld"].value < 1e-5
    assert metrics["gate_greedy"].value == 1.0
    assert {"prefill", "decode", "load", "peak_rss", "size", "perplexity", "bits_per_byte"} <= set(metrics)
    assert all(metrics[name].baseline for name in ("decode", "peak_rss", "size", "perplexity"))
    assert bundle.manifest["source"]["digest"] == llama.digest()
    assert "default text only" in bundle.report.meta["verdict"]
    assert os.listdir(bundle_path.parent) == [bundle_path.name]  # the work folder is gone


def test_int8_is_smaller_and_gated(llama, tmp_path):
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="int8"), accept=("kld<=0.5",))
    bundle = ship(recipe, tmp_path / "int8")
    graph = bundle.target_folder("openvino") / "openvino_model.bin"
    parameters = llama.weight_bytes / 4
    assert graph.stat().st_size < 1.35 * parameters  # one byte a weight, scales and norms; embedding and head once
    assert bundle.report.meta["accepted"] == ["kld<=0.5"]


def test_a_failed_gate_ships_nothing(llama, tmp_path):
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="int4", awq=False, scale_estimation=False,
                                                                  group_size=32), accept=("kld<=1e-9",))  # fmt: skip
    with pytest.raises(LimitExceeded, match="mean KLD"):
        ship(recipe, tmp_path / "int4")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        ship(Recipe(source=str(llama.folder)), tmp_path / "mine")
    assert (tmp_path / "mine" / "work.txt").read_text() == "precious"


def test_an_interrupted_run_leaves_nothing(llama, tmp_path):
    def interrupt(line):
        if "gate export" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ship(Recipe(source=str(llama.folder)), tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_check_measures_the_same_model_again(bundle_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in bundle_path.rglob("*"))
    report = check(bundle_path, repeats=1)
    assert report.get("gate_kld").value < 1e-5
    assert sorted((path, path.stat().st_mtime_ns) for path in bundle_path.rglob("*")) == before


def test_check_finds_another_model_behind_a_valid_manifest(bundle_path, tmp_path):
    """Someone seals other weights: digests fit, the golden log-probabilities do not."""
    from lightship.bundle import pack

    forged = tmp_path / "forged"
    shutil.copytree(bundle_path, forged)
    manifest = json.loads((forged / "manifest.json").read_text())
    (forged / "manifest.json").unlink()
    weights = forged / "targets" / "openvino" / "openvino_model.bin"
    data = bytearray(weights.read_bytes())
    values = np.frombuffer(data, np.float32, len(data) // 4)
    weight = (np.abs(values) > 1e-3) & (np.abs(values) < 10)  # the file holds integers too
    values[weight] *= np.float32(1.5)
    weights.write_bytes(data)
    pack(forged, {key: manifest[key] for key in manifest if key not in ("files", "format", "version")})
    with pytest.raises(LimitExceeded, match="on this machine"):
        check(forged, repeats=1)


def test_bucketed_divergence_against_the_whole():
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(50), 2)
    top = np.argsort(p)[::-1][:50]
    whole = (p * np.log(p / q)).sum()
    assert bucketed(np.log(p[top])[None], np.log(q[top])[None])[0] == pytest.approx(whole, abs=1e-6)
    part = bucketed(np.log(p[top[:10]])[None], np.log(q[top[:10]])[None])[0]
    assert 0 < part < whole


@pytest.mark.parametrize("text", ["kld<0.3", "ppl<=3", "kld<=-1", "kld<=nan", "kld<=x"])
def test_bad_limits_are_refused(text):
    with pytest.raises(UsageError, match="cannot read the limit"):
        parse_accepts((text,))


def test_a_cut_model_ships(llama, tmp_path):
    """Layers of different widths and head counts (structure.json) pass the same gates, the served path included."""
    from tests.test_checkpoint import cut_by_hand

    cut = Checkpoint(shutil.copytree(llama.folder, tmp_path / "cut"))
    cut_by_hand(cut)
    runtime = convert(Recipe(source=str(cut.folder), precision=Precision(name="fp32")), tmp_path / "ir")
    assert (runtime / "openvino_model.bin").stat().st_size < 0.9 * llama.weight_bytes
    assert (runtime / "structure.json").is_file()


@pytest.mark.parametrize(("name", "share"), [("bf16", 0.65), ("int4", 0.45)])
def test_the_other_precisions_ship(llama, tmp_path, name, share):
    """int4 with the data-aware options; a random model of 64 channels is no judge of its quality, hence the limit."""
    recipe = Recipe(source=str(llama.folder), precision=Precision(name=name, group_size=32), accept=("kld<=2",))
    runtime = convert(recipe, tmp_path / name)
    assert (runtime / "openvino_model.bin").stat().st_size < share * llama.weight_bytes


def test_f32_arithmetic_is_recorded_and_used(llama, tmp_path):
    exact = Precision(name="int8", arithmetic="f32")
    runtime = convert(Recipe(source=str(llama.folder), precision=exact, accept=("kld<=0.5",)), tmp_path / "ir")
    assert properties(runtime, EngineSettings())["INFERENCE_PRECISION_HINT"] == "f32"
