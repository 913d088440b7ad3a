"""A decoder with two targets in one bundle, the whole way: gated, measured, checked, served, each with its figures."""

import json
import shutil
from dataclasses import replace

import httpx
import pytest

from lightship import decoder_pipeline
from lightship.bundle import Bundle
from lightship.errors import BundleError, LimitExceeded, UnsupportedError, UsageError
from lightship.find import find
from lightship.pipeline import check, convert, evaluate, plan_convert, ship
from lightship.recipe import Precision, Recipe
from lightship.report import Metric, Report, named
from lightship.serving.server import running, serve
from lightship.serving.settings import ServeSettings
from tests.cli.test_cli import lightship, refused
from tests.tiny import tiny_llama

BOTH = ("openvino", "onnx")


def test_both_are_gated_and_measured(both_path, llama):
    bundle = Bundle.open(both_path)
    assert bundle.targets == list(BOTH) and bundle.manifest["recipe"]["target"] == list(BOTH)
    metrics = {metric.name: metric for metric in bundle.report.metrics}
    for suffix in ("", "_onnx"):
        assert metrics[f"kld{suffix}"].value < 1e-5 and metrics[f"kld{suffix}"].limit == 1e-4
        assert metrics[f"gate_kld{suffix}"].passed and metrics[f"gate_greedy{suffix}"].value == 1.0
        assert metrics[f"served_delta_logprob{suffix}"].value < 1e-2
        assert all(metrics[f"{name}{suffix}"].baseline for name in ("decode", "prefill", "peak_rss", "size"))
    verdict = bundle.report.meta["verdict"]
    assert "with openvino" in verdict and "with onnx" in verdict and "default text only" in verdict
    one, other = (bundle.measured(target) for target in BOTH)
    assert {metric.name for metric in one.metrics} == {metric.name for metric in other.metrics}
    assert (one.get("decode").value, other.get("decode").value) == (
        metrics["decode"].value, metrics["decode_onnx"].value)  # fmt: skip
    assert (both_path / "targets" / "onnx" / "model.onnx").is_file()
    found = evaluate(both_path, str(llama.folder))
    assert found.get("kld_onnx").value < 1e-5 and "not the model" not in found.meta["verdict"]


def test_check_takes_the_first_or_the_one_that_is_named(both_path):
    bundle = Bundle.open(both_path)
    for target in (None, "onnx"):
        report = check(both_path, target=target, repeats=1)
        assert report.get("golden_kld").value < 1e-5
        assert report.get("decode").baseline == bundle.measured(target or "openvino").get("decode").value
    with pytest.raises(BundleError, match="no target 'fake'; it has openvino, onnx"):
        check(both_path, target="fake", repeats=1)


def models(url):
    return httpx.get(f"{url}/v1/models").json()["data"][0]


def test_serve_takes_the_first_or_the_one_that_is_named(both_path):
    bundle, said = Bundle.open(both_path), []
    for target, batching in ((None, "continuous"), ("onnx", "none")):
        with running(both_path, settings=ServeSettings(keys=None, target=target)) as url:
            card = models(url)
            body = {"prompt": "a b c", "max_tokens": 8, "temperature": 0}
            said.append(httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"])
        assert (card["target"], card["batching"]) == (target or "openvino", batching)
        shown = card["measured"]["bundle"]["decode"]["value"]
        assert shown == bundle.measured(target or "openvino").get("decode").value
    assert said[0] == said[1]  # of float32 both say the same
    for start in (lambda given: serve(both_path, port=0, settings=given), lambda given: running(both_path,
                  settings=given).__enter__()):  # fmt: skip
        with pytest.raises(BundleError, match="no target 'fake'"):
            start(ServeSettings(keys=None, target="fake"))


def test_chat_with_one_of_them(both_path):
    done = lightship("chat", both_path, "--target", "onnx", "--max-tokens", "4", input="Hello\n\n")
    assert done.returncode == 0 and done.stdout, done.stderr
    refused("chat", "http://127.0.0.1:1", "--target", "onnx", says="lightship serve")


def test_from_the_command_line(llama, tmp_path):
    given = ["--target", "openvino", "--target", "onnx", "-o", tmp_path / "out"]
    shown = json.loads(lightship("ship", llama.folder, *given, "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in shown["stages"]] == list(decoder_pipeline.stages(BOTH))
    refused("ship", llama.folder, *given[:2], *given, says="name each target once")
    refused("convert", llama.folder, *given, says="convert makes one runtime folder")
    for verb in (convert, plan_convert):
        with pytest.raises(UsageError, match="one runtime folder"):
            verb(Recipe(source=str(llama.folder), target=BOTH), tmp_path / "out")


def test_what_one_of_them_cannot_do_is_refused_first(llama, tmp_path):
    """Both were named: leaving one out would not be what was asked."""
    with pytest.raises(UnsupportedError, match="bf16"):
        ship(Recipe(source=str(llama.folder), target=BOTH, precision=Precision(name="bf16")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_has_the_precision_that_it_can(llama, tmp_path):
    """ONNX has no calibration. Both are int4, and the report says how each was rounded."""
    recipe = Recipe(source=str(llama.folder), target=BOTH, precision=Precision(name="int4", group_size=32),
                    accept=("kld<=3",))  # fmt: skip
    said = []
    bundle = ship(recipe, tmp_path / "out", progress=said.append)
    assert any("fit off: for ONNX" in line for line in said)
    found = bundle.report.meta["precisions"]
    assert (found["openvino"]["fit"], found["onnx"]["fit"]) == (True, False)
    assert bundle.manifest["recipe"]["precision"]["fit"]  # as it was asked for, to be made again


def test_the_one_that_is_left_says_how_it_was_rounded(llama, tmp_path, monkeypatch):
    """The first is left out: what was asked for was its rounding, and is not that of the bundle."""

    def above(*_):
        raise LimitExceeded("gate export openvino: above its limit")

    monkeypatch.setattr(find("targets", "openvino"), "export", above)
    recipe = Recipe(source=str(llama.folder), target=BOTH, precision=Precision(name="int4", group_size=32),
                    accept=("kld<=3",))  # fmt: skip
    bundle = ship(recipe, tmp_path / "out")
    assert bundle.targets == ["onnx"] and bundle.manifest["recipe"]["precision"]["fit"]
    assert bundle.report.meta["precision"]["fit"] is False


@pytest.mark.parametrize("where", ["export", "scored text"])
def test_the_one_above_its_limit_is_left_out(llama, tmp_path, monkeypatch, where):
    onnx = find("targets", "onnx")
    if where == "export":
        export, other = onnx.export, tiny_llama(tmp_path / "another", initializer_range=0.2)
        monkeypatch.setattr(onnx, "export", lambda checkpoint, folder, dtype: export(other, folder, dtype))
    else:
        quality = decoder_pipeline._quality

        def worse(name, *others):
            found = quality(name, *others)
            return [replace(each, value=0.5) if (each.name, name) == ("kld", "onnx") else each for each in found]

        monkeypatch.setattr(decoder_pipeline, "_quality", worse)
    recipe, said = Recipe(source=str(llama.folder), target=BOTH, precision=Precision(name="fp32")), []
    bundle = ship(recipe, tmp_path / "out", progress=said.append)
    assert bundle.targets == ["openvino"] and not (tmp_path / "out" / "targets" / "onnx").exists()
    assert any("onnx is above its limit: left out" in line for line in said)
    assert list(bundle.report.meta["left_out"]) == ["onnx"] and "onnx left out" in bundle.report.meta["verdict"]
    assert not any(metric.name.endswith("_onnx") for metric in bundle.report.metrics)
    with pytest.raises(LimitExceeded, match="gate export onnx" if where == "export" else "scored text"):
        ship(recipe.model_copy(update={"target": "onnx"}), tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_an_encoder_decoder_has_both_too(tmp_path):
    from tests.tiny import tiny_seq2seq

    checkpoint = tiny_seq2seq(tmp_path / "model", "t5")
    recipe = Recipe(source=str(checkpoint.folder), target=BOTH, precision=Precision(name="fp32"))
    bundle = ship(recipe, tmp_path / "out")
    assert bundle.kind == "seq2seq" and bundle.targets == list(BOTH)
    assert bundle.report.get("kld").value < 1e-5 and bundle.report.get("kld_onnx").value < 1e-5
    assert check(tmp_path / "out", target="onnx", repeats=1).get("golden_kld").passed
    shutil.rmtree(tmp_path / "out")


def test_figures_of_a_target():
    def metric(name, value):
        return Metric(name, value, "s", 1, None, "lower", None, "")

    order = ["a", "b", "c"]
    every = [each for number, name in enumerate(order) for each in named([metric("x", number), metric("y", number)],
             name, order)]  # fmt: skip
    report = Report(tuple(every), {})
    assert [metric.name for metric in every] == ["x", "y", "x_b", "y_b", "x_c", "y_c"]
    for number, name in enumerate(order):
        assert [(each.name, each.value) for each in report.of_target(name, order).metrics] == [
            ("x", number), ("y", number)]  # fmt: skip
    assert report.of_target("a", ["a"]) == report
