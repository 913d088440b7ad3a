"""A run resumes: nothing is done twice, a change redoes what depends on it, and a killed run loses only its stage."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightship.bundle import Bundle
from lightship.decoder_pipeline import PER_TARGET, stages
from lightship.errors import UsageError
from lightship.pipeline import run
from lightship.recipe import Precision, Recipe
from tests.tiny import tiny_llama


@pytest.fixture
def recipe(llama, tmp_path):
    return Recipe(source=str(llama.folder), name="tiny", out=str(tmp_path / "bundle"), accept=("kld<=0.5",))


def again(recipe, folder):
    """The stages that `run` really made, and its last word."""
    lines = []
    bundle = run(recipe, runs=folder / "runs", progress=lines.append)
    made = [line for line, after in zip(lines, [*lines[1:], ""], strict=True)
            if line.startswith("[") and "done before" not in after]  # fmt: skip
    return bundle, [line.split("] ")[1] for line in made], lines[-1]


def of_openvino(*names):
    return [f"{name} openvino" for name in names]


def test_a_run_resumes(recipe, tmp_path):
    first, made, _ = again(recipe, tmp_path)
    assert made == list(stages(["openvino"]))
    second, made, word = again(recipe, tmp_path)
    assert made == ["read"] and word == f"nothing to do: {recipe.out} is up to date"  # a folder is read where it lies
    assert second.digest == first.digest

    exact = recipe.model_copy(update={"precision": Precision(name="int8", arithmetic="f32")})
    third, made, _ = again(exact, tmp_path)
    assert made == ["read", *of_openvino("quantise", "gate", "served path"), "evaluate", "pack"]
    assert third.digest != first.digest and Bundle.open(Path(recipe.out)).digest == third.digest

    wider = exact.model_copy(update={"accept": ("kld<=0.6",)})  # only the verdicts depend on a limit
    assert again(wider, tmp_path)[1] == ["read", *of_openvino("gate export", "gate", "served path"), "pack"]


def test_another_target_does_only_its_own_stages(recipe, tmp_path):
    """What the original said, and what was made for the first target, is found again."""
    first, *_ = again(recipe, tmp_path)
    both = recipe.model_copy(update={"target": ("openvino", "onnx")})
    second, made, _ = again(both, tmp_path)
    assert made == ["read", *(f"{stage} onnx" for stage in PER_TARGET), "evaluate", "pack"]
    assert (first.targets, second.targets) == (["openvino"], ["openvino", "onnx"])
    assert again(both, tmp_path)[1] == ["read"]
    shutil.rmtree(recipe.out)  # packed anew from what was kept: still the first that was named before the other
    third, made, _ = again(both, tmp_path)
    assert made == ["read", "pack"] and third.targets == second.targets
    assert third.report.metrics == second.report.metrics


def test_another_bundle_in_the_way_is_kept(recipe, bundle_path, tmp_path):
    other = recipe.model_copy(update={"out": str(bundle_path), "precision": Precision(name="fp32")})
    before = Bundle.open(bundle_path).digest
    with pytest.raises(UsageError, match="another bundle, not made by this run"):
        run(other, runs=tmp_path / "runs")
    assert Bundle.open(bundle_path).digest == before


def contents(runs):
    """Name and SHA-256 of every file that a stage made, speeds and memory of this machine left out."""
    found = {}
    for path in sorted(runs.rglob("*")):
        if path.is_file() and "evaluate" not in str(path) and path.name not in ("bundle.json",):
            found[str(path.relative_to(runs))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def killed(recipe_file, runs, seconds):
    command = [sys.executable, "-m", "lightship", "run", str(recipe_file), "--runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def sure_after_kills(folder, moments):
    tiny_llama(folder / "model")
    text = f"source: {folder / 'model'}\nname: tiny\nout: {folder / 'NAME'}\nprecision: {{name: fp32}}\n"
    for name in ("calm", "killed"):
        (folder / f"{name}.yaml").write_text(text.replace("NAME", name))
    for moment in moments:
        killed(folder / "killed.yaml", folder / "runs-killed", moment)
    for name in ("calm", "killed"):
        command = [sys.executable, "-m", "lightship", "run", str(folder / f"{name}.yaml"), "--runs"]
        done = subprocess.run([*command, str(folder / f"runs-{name}")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert contents(folder / "runs-calm") == contents(folder / "runs-killed")
    calm, sure = (Bundle.open(folder / name).manifest["files"] for name in ("calm", "killed"))
    measured = ("report.", "recipe.json")  # speeds differ from run to run, the recipe names its folder
    assert {name: entry for name, entry in calm.items() if not name.startswith(measured)} == {
        name: entry for name, entry in sure.items() if not name.startswith(measured)
    }
    assert not list(folder.glob("runs-killed/tiny/.*"))


def test_two_kills(tmp_path):
    sure_after_kills(tmp_path, [random.Random(1).uniform(2, 12), random.Random(2).uniform(4, 10)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path):
    moments = random.Random(0)
    sure_after_kills(tmp_path, [moments.uniform(0.5, 15) for _ in range(20)])
