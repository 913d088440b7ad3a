"""Before a run: what headers tell, what is predicted from it, what is refused, and that asking changes nothing."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from lightship import costs, machine, preflight
from lightship.checkpoint import Checkpoint
from lightship.costs import Rates
from lightship.decoder_pipeline import stages
from lightship.errors import MissingExtra, SourceError, UnsafeSource, UnsupportedError
from lightship.evaluation.text import amount
from lightship.pipeline import convert, plan_convert, plan_run, plan_ship, run, ship
from lightship.preflight import Cost, Plan, Seen, Step, check_architecture, duration, gigabytes
from lightship.recipe import Precision, Recipe
from lightship.sources import peek
from tests.cli.test_cli import edit, lightship, refused
from tests.sources.test_gguf import write_gguf
from tests.tiny import tiny_gpt2, tiny_llama

STEADY = Rates(exact=1e11, fast=3e11, memory=2e10, file=1e9, slow=1.0)
GB = 10**9
STAGES = stages(["openvino"])


@pytest.fixture
def copy(llama, tmp_path):
    return Checkpoint(shutil.copytree(llama.folder, tmp_path / "model"))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


# ── What headers tell ───────────────────────────────────────────────────────


def test_the_shape_of_a_checkpoint(llama):
    """Against the loaded model itself."""
    model = llama.load()
    shape = peek(str(llama.folder)).shape
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.table == model.get_input_embeddings().weight.numel() and shape.tied
    assert shape.multiplied == shape.parameters
    assert (shape.layers, shape.context, shape.width, shape.size) == (2, 2048, 4, llama.weight_bytes)


def test_a_table_that_is_only_looked_up_is_not_multiplied_with(tmp_path):
    shape = peek(str(tiny_llama(tmp_path, tie_word_embeddings=False).folder)).shape
    assert not shape.tied and shape.multiplied == shape.parameters - shape.table


def test_the_shape_of_other_names(tmp_path):
    shape = peek(str(tiny_gpt2(tmp_path).folder)).shape
    assert (shape.architecture, shape.layers, shape.context) == ("gpt2", 2, 2048)


@pytest.mark.parametrize(("kind", "width"), [("F16", 2), ("Q8_0", 4)])
def test_the_shape_of_a_gguf_file_is_that_of_its_checkpoint(llama, tmp_path, kind, width):
    path = tmp_path / "tiny.gguf"
    write_gguf(llama, path, kind)
    seen, whole = peek(str(path)), peek(str(llama.folder)).shape
    assert replace(seen.shape, unpacked=0, files=0, width=4, size=0) == replace(whole, files=0, size=0)
    assert (seen.shape.width, seen.shape.unpacked) == (width, path.stat().st_size)
    assert seen.shape.size == width * whole.parameters and seen.config is None


def test_a_damaged_header_is_named(llama, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(llama, path, "F16")
    whole = path.read_bytes()
    for end in (30, 200, 5000):
        path.write_bytes(whole[:end])
        with pytest.raises(SourceError, match="cut short or damaged"):
            peek(str(path))


def test_what_is_not_there_is_not_predicted(tmp_path):
    assert peek("nobody/no-model") == Seen(reason="nobody/no-model is not downloaded yet")
    planned = plan_ship(Recipe(source="nobody/no-model"), tmp_path / "out")
    assert planned.said() == "what it needs is not predicted: nobody/no-model is not downloaded yet"
    planned.check()  # what is not known is no shortage
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_in_the_cache(llama, tmp_path, monkeypatch):
    """As the cache lies on disk: whole, then without its weights."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--org--name" / "snapshots" / commit
    shutil.copytree(llama.folder, place)
    (place.parents[1] / "refs").mkdir()
    (place.parents[1] / "refs" / "main").write_text(commit)
    assert peek("org/name").shape == peek(str(llama.folder)).shape
    (place / "model.safetensors").unlink()
    seen = peek("org/name")
    assert seen.shape is None and seen.config["model_type"] == "llama" and "not downloaded" in seen.reason
    edit(place / "config.json", model_type="perceptron-9")
    with pytest.raises(UnsupportedError, match="perceptron-9"):
        plan_ship(Recipe(source="org/name"), tmp_path / "out")


def test_mixtures_of_experts_and_targets_not_measured(copy, tmp_path):
    edit(copy.folder / "config.json", num_local_experts=8)
    assert "mixtures of experts" in plan_ship(Recipe(source=str(copy.folder)), tmp_path / "out").said()
    edit(copy.folder / "config.json", num_local_experts=0)
    recipe = Recipe(source=str(copy.folder))
    other = recipe.model_copy(update={"target": "elsewhere"})
    planned = preflight.plan(other, peek(recipe.source), lambda rates: {}, ("read",), tmp_path / "out")
    assert "target elsewhere has not been measured" in planned.said() and planned.to_dict()["seconds"] is None
    exact = Recipe(source=str(copy.folder), target="onnx", precision=Precision(name="int8", arithmetic="f32"))
    assert "arithmetic f32 has not been measured" in plan_ship(exact, tmp_path / "out").said()
    edit(copy.folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "encoder-decoders have not been measured" in plan_ship(recipe, tmp_path / "out").said()
    edit(copy.folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    gptq = Recipe(source=str(copy.folder), precision=Precision(name="int4", gptq=True))
    assert "gptq" in plan_ship(gptq, tmp_path / "out").said()


# ── What is predicted ───────────────────────────────────────────────────────


def test_disk_is_predicted_as_it_is_used(llama, tmp_path):
    """Stage by stage against the files of a run: log-probabilities and weights; a tiny graph's XML is no figure."""
    recipe = Recipe(source=str(llama.folder), name="tiny", out=str(tmp_path / "out"), accept=("kld<=0.5",))
    shape = peek(recipe.source).shape
    predicted = costs.predict(shape, amount(recipe, shape.context), STEADY, {"openvino": recipe.precision})
    bundle = run(recipe, runs=tmp_path / "runs")
    for stage, files in (
        ("original", "*.npy"), ("export openvino", "*model.bin"), ("quantise openvino", "*model.bin"),
    ):  # fmt: skip
        folder = next((tmp_path / "runs" / "tiny").glob(f"0?-{stage.replace(' ', '-')}-*"))
        size = sum(path.stat().st_size for path in folder.rglob(files))
        constants = costs.TARGETS["openvino"]
        fixed = 0 if stage == "original" else constants.graph_layer * shape.layers + constants.tokenizers * shape.files
        assert predicted[stage].kept - fixed == pytest.approx(size, rel=0.05), stage
    scored = bundle.report.get("kld").n
    assert predicted["evaluate"].passing == scored * shape.vocabulary * 4


@pytest.mark.parametrize(("precision", "share"), [
    (Precision(name="fp32"), 4.0), (Precision(name="bf16"), 2.0), (Precision(name="int8"), 1.0),
    (Precision(name="int4", tables="int4"), 0.5 + 2 / 64), (Precision(name="int4", ratio=0.0), 1.0),
])  # fmt: skip
def test_bytes_of_a_weight(llama, precision, share):
    shape = replace(peek(str(llama.folder)).shape, layers=0)
    integers = precision.name in ("int8", "int4") and precision.tables == "int8"
    head = 2 / 64 * shape.table if integers else 0  # its scales
    assert costs.served_bytes(shape, precision) == pytest.approx(share * shape.parameters + head)


def test_more_work_costs_more(llama):
    """Slower rates, a larger model, a wider precision: never less time, memory or disk."""
    shape, recipe = peek(str(llama.folder)).shape, Recipe(source="x")
    tokens = amount(recipe, shape.context)

    def totals(shape=shape, precision=recipe.precision, tokens=tokens, rates=STEADY, targets=("openvino",)):
        found = costs.predict(shape, tokens, rates, dict.fromkeys(targets, precision)).values()
        return sum(cost.seconds for cost in found), max(cost.memory for cost in found), sum(cost.kept for cost in found)

    seconds, memory, kept = totals()
    large = replace(shape, parameters=10**9, size=4 * 10**9, table=10**8)
    assert all(more > less for more, less in zip(totals(large), (seconds, memory, kept), strict=True))
    for slower in (replace(STEADY, slow=2.0), replace(STEADY, exact=1e9), replace(STEADY, file=1e5)):
        assert totals(rates=slower)[0] > seconds and totals(rates=slower)[1:] == (memory, kept)
    whole = amount(Recipe(source="x", evaluate="full"), shape.context)
    assert totals(tokens=whole)[0] > seconds
    assert totals(large, Precision(name="fp32"))[2] > totals(large)[2]
    one, both = totals(large), totals(large, targets=("onnx", "openvino"))
    assert all(more > less for more, less in zip(both, one, strict=True))
    searched = amount(Recipe(source="x", precision=Precision(name="int4")), shape.context)
    for figure in (0, 1):  # scales are searched with calibration data
        assert totals(large, Precision(name="int4"), searched)[figure] > totals(large)[figure]
    mixed = Precision(name="int4", bits=6)  # each matrix is tried, then some are fitted
    assert totals(large, mixed, searched)[0] > totals(large, Precision(name="int4"), searched)[0]


def test_every_stage_has_its_cost(llama, tmp_path):
    for target in (*costs.TARGETS, tuple(costs.TARGETS)):
        planned = plan_ship(Recipe(source=str(llama.folder), target=target), tmp_path / "out")
        assert planned.predicted
        assert len(planned.steps) == (9 if isinstance(target, str) else 14)


def test_a_second_target_adds_time_and_disk_and_what_the_first_leaves_in_memory(llama):
    """Each has its turn: no stage needs both; what ONNX Runtime does not give back is there in the other's turn."""
    shape = replace(peek(str(llama.folder)).shape, parameters=10**9, size=2 * 10**9, table=10**8, width=2)
    tokens, int8 = amount(Recipe(source="x"), shape.context), Precision(name="int8")
    onnx, openvino, both, turned = (
        costs.predict(shape, tokens, STEADY, dict.fromkeys(targets, int8))
        for targets in (["onnx"], ["openvino"], ["openvino", "onnx"], ["onnx", "openvino"])
    )
    assert both["quantise onnx"] == onnx["quantise onnx"] and both["gate openvino"] == openvino["gate openvino"]
    assert turned["gate openvino"].memory > openvino["gate openvino"].memory
    assert both["pack"].kept == onnx["pack"].kept + openvino["pack"].kept
    for one in (onnx, openvino):
        assert both["evaluate"].seconds > one["evaluate"].seconds
        assert both["evaluate"].memory >= one["evaluate"].memory


@pytest.mark.parametrize("precision", [
    Precision(name="fp32"), Precision(name="int8"), Precision(name="int4", fit=False),
], ids=["fp32", "int8", "int4"])  # fmt: skip
def test_onnx_takes_more_memory_and_disk(llama, precision):
    """Its exports are in float32, its scales are finer, and its room is not given back."""
    shape = replace(peek(str(llama.folder)).shape, parameters=10**9, size=2 * 10**9, table=10**8, width=2)
    tokens = amount(Recipe(source="x"), shape.context)
    one, other = (costs.predict(shape, tokens, STEADY, {target: precision}) for target in ("openvino", "onnx"))
    assert other["export onnx"].kept > 3.9e9 and other["evaluate"].memory > one["evaluate"].memory
    assert (other["quantise onnx"].kept > one["quantise openvino"].kept) == (precision.name != "fp32")


def test_a_plan_adds_up(tmp_path):
    steps = (
        Step("one", False, Cost(10, 3 * GB, kept=2 * GB)),
        Step("two", False, Cost(20, 1 * GB, kept=1 * GB, passing=4 * GB)),
        Step("three", False, Cost(30, 2 * GB, kept=0.5 * GB)),
    )
    planned = Plan(steps, tmp_path / "work", tmp_path / "out")
    assert (planned.seconds, planned.memory, planned.disk, planned.result) == (60, 3 * GB, 7 * GB, 0.5 * GB)
    rest = replace(planned, steps=(replace(steps[0], done=True), *steps[1:]))
    assert (rest.seconds, rest.memory, rest.disk) == (50, 2 * GB, 5 * GB)
    assert rest.times == {"one": 0, "two": 20, "three": 30}
    assert replace(rest, steps=(*rest.steps, Step("four", False, None))).times == {}
    assert "(1 of 3 stages are done)" in rest.said()
    assert replace(planned, steps=tuple(replace(step, done=True) for step in steps)).said() == "nothing to do"


@pytest.mark.parametrize(("value", "said"), [(2.34e9, "2.3 GB"), (5.38e8, "540 MB"), (4.4e6, "4 MB"), (9, "1 MB")])
def test_sizes_in_words(value, said):
    assert gigabytes(value) == said


@pytest.mark.parametrize(("value", "said"), [(5, "5 seconds"), (89, "89 seconds"), (170, "3 minutes"),
                                             (7000, "2 hours")])  # fmt: skip
def test_times_in_words(value, said):
    assert duration(value) == said


# ── What is refused ─────────────────────────────────────────────────────────


def test_too_little_memory(llama, tmp_path, monkeypatch):
    recipe = Recipe(source=str(llama.folder), precision=Precision(name="fp32"))
    need = plan_convert(recipe, tmp_path / "out").memory
    monkeypatch.setattr(preflight, "memory_available", lambda: int(0.9 * need))
    for verb in (ship, convert):
        with pytest.raises(UnsupportedError, match=r"needs about .* of memory, .* available\n.*--ignore-shortage"):
            verb(recipe, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="of memory"):
        run(recipe.model_copy(update={"out": str(tmp_path / "out")}), runs=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []
    said = []
    convert(recipe, tmp_path / "out", ignore_shortage=True, progress=said.append)
    assert (tmp_path / "out").is_dir() and "of memory" in said[0] and "available" in said[0]


def test_nearly_too_little_is_said(llama, tmp_path, monkeypatch):
    recipe = Recipe(source=str(llama.folder))
    planned = plan_ship(recipe, tmp_path / "out")
    assert "available" not in planned.said()
    monkeypatch.setattr(preflight, "memory_available", lambda: int(1.05 * planned.memory))
    planned.check()
    assert "available" in planned.said()


def test_too_little_disk(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UnsupportedError, match=rf"of disk below {tmp_path}, 1 MB free"):
        ship(Recipe(source=str(llama.folder)), tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_control_groups(tmp_path):
    """The tightest of nested groups counts; file pages that can be dropped are available."""
    outer, inner = tmp_path, tmp_path / "job"
    inner.mkdir()
    for group, limit, used, files in ((outer, "max", 0, 0), (inner, 5 * 2**20, 4 * 2**20, 2**20)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
    assert machine.memory_available([outer, inner]) == 2 * 2**20
    assert machine.memory_available([outer]) > 2**30
    (tmp_path / "cgroup").write_text("1:pids:/x\n0::/job\n")
    assert machine.own_groups(tmp_path, tmp_path / "cgroup") == [inner, outer]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "perceptron-9", "transformers_version": "9.1"}, r"know the architecture 'perceptron-9'.* 9\.1"),
        ({"model_type": "vit"}, "'vit' has no decoder"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"auto_map": {"AutoModel": "x.y"}}, "runs no code"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
    ],
)
def test_architectures(copy, tmp_path, changes, says):
    edit(copy.folder / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=says):
        plan_ship(Recipe(source=str(copy.folder)), tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "llama", "architectures": ["LLaMAForCausalLM"]},
    ],
)
def test_decoders_pass(config):
    check_architecture(config)


def test_the_names_are_those_that_transformers_has():
    """They are read from its source; the real mappings say the same."""
    from transformers.models.auto import modeling_auto

    named = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert preflight.decoders() == named and preflight.model_types() >= set(named) | {"bert", "t5", "vit"}


def test_a_missing_package(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(
        preflight.first_look.__globals__["find"]("targets", "openvino").__dict__, "NEEDS", ("no_such_nncf",)
    )
    with pytest.raises(MissingExtra, match=r"no_such_nncf.*\n.*lightship\[build\]"):
        plan_ship(Recipe(source=str(llama.folder)), tmp_path / "out")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeSource):
        peek(str(tmp_path / "model.bin"))


# ── On the command line ─────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["ship", "convert"])
def test_a_dry_run_writes_nothing(copy, tmp_path, verb):
    before = snapshot(tmp_path)
    shown = lightship(verb, copy.folder, "-o", tmp_path / "new" / "out", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "gate export" in shown.stdout and ("evaluate" in shown.stdout) == (verb == "ship")
    assert shown.stdout.splitlines()[-1].startswith("needs about ")
    assert f"would write   {tmp_path / 'new' / 'out'}" in shown.stdout
    found = json.loads(lightship(verb, copy.folder, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert found["stages"][0] | {"seconds": 0} == {
        "stage": "read", "done": False, "seconds": 0, "memory": 10**8, "disk": 0,
    }  # fmt: skip
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]), abs=0.5)
    assert snapshot(tmp_path) == before


def test_a_dry_run_refuses_what_a_run_would_refuse(bundle_path, llama, copy, tmp_path):
    before = snapshot(bundle_path)
    refused("ship", llama.folder, "-o", bundle_path, "--dry-run", says="exists already")
    assert snapshot(bundle_path) == before
    refused("ship", copy.folder, "--text", "none.txt", "--dry-run", says="text: there is no file none.txt")
    refused("ship", copy.folder, "--target", "gguf", "--dry-run", says="lightship convert --target gguf -p q8_0")
    refused("ship", copy.folder, "-p", "q5_0", "--dry-run", says=["--precision int8", "convert --target gguf` has it"])
    refused("convert", copy.folder, "--target", "gguf", "-p", "q8_0", "--kv", "u8", "--dry-run", says="fixes no kv")
    edit(copy.folder / "config.json", model_type="perceptron-9")
    refused("ship", copy.folder, "-o", tmp_path / "out", "--dry-run", says="perceptron-9")


def test_a_dry_run_says_which_stages_are_done(llama, tmp_path):
    recipe = Recipe(source=str(llama.folder), name="tiny", out=str(tmp_path / "out"), accept=("kld<=0.5",))
    done = ["original", "export openvino", "gate export openvino", "quantise openvino"]

    def stop(line):
        if line.endswith("] gate openvino"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, runs=tmp_path / "runs", progress=stop)
    file = tmp_path / "recipe.json"  # JSON is YAML
    file.write_text(recipe.model_dump_json())
    before = snapshot(tmp_path)
    found = json.loads(lightship("run", file, "--runs", tmp_path / "runs", "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in found["stages"] if stage["done"]] == done
    shown = lightship("run", file, "--runs", tmp_path / "runs", "--dry-run").stdout
    assert "(4 of 9 stages are done)" in shown and shown.count("done before") == 4
    assert snapshot(tmp_path) == before

    def finished(**changes):
        steps = plan_run(recipe.model_copy(update=changes), runs=tmp_path / "runs").steps
        return [step.name for step in steps if step.done]

    assert finished(precision=Precision(name="int8", arithmetic="f32")) == done[:3]
    assert finished(accept=("kld<=0.6",)) == [
        "original",
        "export openvino",
        "quantise openvino",
    ]  # a limit decides verdicts only
    run(recipe, runs=tmp_path / "runs")
    assert finished() == list(STAGES) and plan_run(recipe, runs=tmp_path / "runs").said() == "nothing to do"
    shutil.rmtree(tmp_path / "out")
    assert finished() == [name for name in STAGES if name not in ("read", "pack")]


def test_a_file_that_is_not_unpacked_yet(llama, tmp_path):
    """What comes after it depends on what is in it; once it is there the rest is told apart."""
    path = tmp_path / "tiny.gguf"
    write_gguf(llama, path, "F16")
    recipe = Recipe(source=str(path), name="tiny", out=str(tmp_path / "out"))

    def stop(line):
        if line.endswith("] export openvino"):
            raise KeyboardInterrupt

    assert not any(step.done for step in plan_run(recipe, runs=tmp_path / "runs").steps)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, runs=tmp_path / "runs", progress=stop)
    steps = plan_run(recipe, runs=tmp_path / "runs").steps
    assert [step.name for step in steps if step.done] == ["read", "original"]
    shutil.rmtree(next((tmp_path / "runs" / "tiny").glob("01-read-*")))
    assert not any(step.done for step in plan_run(recipe, runs=tmp_path / "runs").steps)


def test_a_run_says_first_what_it_needs(llama, tmp_path):
    done = lightship("convert", llama.folder, "-o", tmp_path / "out", "--accept", "kld<=0.5")
    assert done.returncode == 0 and "needs about " in done.stderr.splitlines()[0]


def test_preflight_imports_nothing_heavy(llama, tmp_path):
    code = f"""
import sys
from pathlib import Path
from lightship.pipeline import plan_ship
from lightship.recipe import Recipe
plan_ship(Recipe(source={str(llama.folder)!r}), Path({str(tmp_path / "out")!r}))
print({{"torch", "transformers", "openvino", "nncf"}} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
