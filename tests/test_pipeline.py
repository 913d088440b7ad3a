"""The whole way on a tiny model: what is shipped, what is refused, what is left behind."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from lightship.bundle import Bundle
from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UnsupportedError, UsageError
from lightship.evaluation.replay import bucketed
from lightship.output import appear
from lightship.pipeline import check, convert, evaluate, run, ship
from lightship.recipe import Precision, Recipe, parse_accepts
from lightship.targets.openvino import properties
from tests.tiny import tiny_llama


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
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="int4", fit=False, group_size=32),
                    accept=("kld<=1e-9",))  # fmt: skip
    with pytest.raises(LimitExceeded, match="mean KLD"):
        ship(recipe, tmp_path / "int4")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        ship(Recipe(source=str(llama.folder)), tmp_path / "mine")
    assert (tmp_path / "mine" / "work.txt").read_text() == "precious"


def test_only_results_of_ours_are_replaced(llama, tmp_path):
    """--force is no licence to delete: not a folder of the user's, not the model itself."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("precious")
    recipe = Recipe(source=str(llama.folder))
    for out in (tmp_path / "docs", llama.folder, llama.folder.parent):
        for verb in (ship, convert):
            with pytest.raises(UsageError, match=r"was not made by lightship|holds the source"):
                verb(recipe, out, force=True)
    with pytest.raises(UsageError, match="was not made by lightship"):
        run(recipe.model_copy(update={"out": str(tmp_path / "docs")}), runs=tmp_path / "runs")
    assert (tmp_path / "docs" / "thesis.txt").read_text() == "precious" and (llama.folder / "config.json").is_file()


def test_a_failing_exchange_puts_the_old_result_back(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "work" / "new").mkdir(parents=True)
    rename = os.rename

    def interrupted(source, target):
        if source == tmp_path / "work" / "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        appear(tmp_path / "work" / "new", tmp_path / "old")
    assert (tmp_path / "old").is_dir() and not (tmp_path / "work" / "replaced").exists()


def test_above_its_limit_on_the_users_text_nothing_is_shipped(llama, tmp_path, monkeypatch):
    """The gates pass on the default text; what counts as well is the text that the user will have."""
    from lightship import decoder_pipeline

    quality = decoder_pipeline._quality

    def worse(*arguments):
        return [replace(metric, value=0.5) if metric.name == "kld" else metric for metric in quality(*arguments)]

    monkeypatch.setattr(decoder_pipeline, "_quality", worse)
    with pytest.raises(LimitExceeded, match=r"evaluate: mean KLD 0\.5 on the scored text.*\n.*kld<=0\.53"):
        ship(Recipe(source=str(llama.folder), precision=Precision(name="fp32")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_accepted_limit_holds_for_the_export_too(llama, tmp_path, monkeypatch):
    """The hint of a failed export gate must help whoever follows it."""
    from lightship.evaluation import parity

    limits = []
    monkeypatch.setattr(parity, "check_parity", lambda found, limit, stage, _: limits.append((stage, limit)))
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="fp32"), accept=("kld<=0.3",))
    convert(recipe, tmp_path / "ir")
    assert limits == [("gate export openvino", 0.3), ("gate openvino", 0.3)]


def test_a_short_context_ships(tmp_path):
    """Speed is measured within the model's context, the gates and the passages too."""
    short = tiny_llama(tmp_path / "short", max_position_embeddings=128)
    bundle = ship(Recipe(source=str(short.folder), precision=Precision(name="fp32")), tmp_path / "out")
    assert "96 prompt tokens" in bundle.report.get("prefill").method


def test_golden_cases_through_the_pipeline(llama, tmp_path):
    """One case that the original's own answer passes, one that nothing passes, one with messages."""
    cases = [
        {"id": "any", "prompt": "Hello", "expect": {"regex": "^"}, "max_tokens": 4},
        {"id": "none", "prompt": "Hello", "expect": {"exact": "no model says this"}, "max_tokens": 4},
        {"id": "chat", "messages": [{"role": "user", "content": "Hi"}], "expect": {"regex": "^"}, "max_tokens": 4},
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="fp32"), golden=str(tmp_path / "cases.jsonl"))
    report = ship(recipe, tmp_path / "out").report
    golden = report.get("golden")
    assert (golden.value, golden.baseline, golden.n) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert report.get("golden_lost").value == 0


def test_groups_that_do_not_fit_are_an_error_of_ours(llama, tmp_path):
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="int4", group_size=96))
    with pytest.raises(UnsupportedError, match="groups of 96"):
        convert(recipe, tmp_path / "out")


@pytest.mark.parametrize("option", [{"group_size": 32}, {"gptq": True}, {"awq": True}, {"fit": False}, {"ratio": 0.5}])
def test_options_that_would_change_nothing_are_refused(option):
    with pytest.raises(ValidationError, match="changes nothing at int8"):
        Precision(name="int8", **option)


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
    assert report.get("golden_kld").value < 1e-5
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


def test_the_revision_is_of_the_source_that_was_shipped(bundle_path, llama, tmp_path):
    """A bundle made from a revision on the hub can be measured against a folder, which has none."""
    from lightship.bundle import pack

    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    manifest["recipe"].update(source="org/name", revision="v1")
    pack(copy, {key: manifest[key] for key in manifest if key not in ("files", "format", "version")})
    assert evaluate(copy, str(llama.folder)).get("kld").value < 1e-5


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


@pytest.mark.parametrize(("name", "options", "share"), [("bf16", {}, 0.65), ("int4", {"group_size": 32}, 0.45)])
def test_the_other_precisions_ship(llama, tmp_path, name, options, share):
    """int4 with the data-aware options; a random model of 64 channels is no judge of its quality, hence the limit."""
    recipe = Recipe(source=str(llama.folder), precision=Precision(name=name, **options), accept=("kld<=2",))
    runtime = convert(recipe, tmp_path / name)
    assert (runtime / "openvino_model.bin").stat().st_size < share * llama.weight_bytes


def test_f32_arithmetic_is_recorded_and_used(llama, tmp_path):
    exact = Precision(name="int8", arithmetic="f32")
    runtime = convert(Recipe(source=str(llama.folder), precision=exact, accept=("kld<=0.5",)), tmp_path / "ir")
    assert properties(runtime, EngineSettings())["INFERENCE_PRECISION_HINT"] == "f32"
