"""Adapters from their tokenizer and lineage to the bundle: what is read, planned, shipped and done again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lightship.checkpoint import Checkpoint
from lightship.cli.evaluate import command as evaluate_command
from lightship.decoder_pipeline import EXACT
from lightship.errors import SourceError, UnsupportedError, UsageError
from lightship.papers import published
from lightship.pipeline import evaluate, plan_ship, run, ship
from lightship.recipe import Precision, Recipe
from lightship.sources import huggingface, look, peek, read
from lightship.targets.openvino import open_scorer
from tests.sources.adapters import TOKENS, adapt, change, logits, of_peft, refused, rewrite

# peft warns of all that it guesses
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]


def test_the_tokenizer_of_the_adapter(adapter, llama, tmp_path):
    """Taken whole where it is whole; one that knows more ids than the base has rows is refused."""
    (adapter / "chat_template.jinja").write_text("half a tokenizer")
    first = read(str(adapter), tmp_path / "first" / "model")
    assert (first.folder / "chat_template.jinja").read_text() == (llama.folder / "chat_template.jinja").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama.folder / name, adapter)
    second = read(str(adapter), tmp_path / "second" / "model")
    assert (second.folder / "chat_template.jinja").read_text() == "half a tokenizer"
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 512, "content": "<|new|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(UnsupportedError, "goes up to id 512, its base ends at 511", adapter, tmp_path)
    (adapter / "tokenizer.json").write_text("{")
    refused(SourceError, "is no tokenizer", adapter, tmp_path)


def test_lineage(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama.folder, base)
    (base / "lineage.json").write_text('[{"step": "earlier", "precision": {"Q4_0": 1}}]')
    adapter = adapt(Checkpoint(base), tmp_path / "mine", target_modules=["v_proj"], use_rslora=True)
    shutil.copy(base / "tokenizer.json", adapter)  # the history is the base's all the same
    earlier, entry = read(str(adapter), tmp_path / "work" / "model").lineage
    assert earlier["step"] == "earlier" and entry.pop("time")
    assert entry == {
        "step": "adapter",
        "options": {"r": 4, "lora_alpha": 8.0, "target_modules": ["v_proj"], "bias": "none", "use_rslora": True},
        "source": "mine",
        "revision": None,
        "digest": Checkpoint(adapter).digest(),
        "base": {"source": "base", "revision": None, "digest": Checkpoint(base).digest()},
    }


def test_an_adapter_and_a_base_on_the_hub(adapter, llama, tmp_path, monkeypatch):
    """The revision asked for is the adapter's; its base is fetched at the revision that the adapter names."""
    change(adapter, base_model_name_or_path="org/base", revision="v7")
    asked = []

    def download(name, revision, token=None):
        asked.append((name, revision, token))
        return {"org/tuned": adapter, "org/base": llama.folder}[name]

    monkeypatch.setattr(huggingface, "download", download)
    monkeypatch.chdir(tmp_path)
    entry = read("org/tuned", tmp_path / "work" / "model", revision="v1", token="t0").lineage[-1]
    assert asked == [("org/tuned", "v1", "t0"), ("org/base", "v7", "t0")]
    assert (entry["source"], entry["revision"]) == ("org/tuned", "v1")
    assert entry["base"] == {"source": "org/base", "revision": "v7", "digest": llama.digest()}
    asked.clear()
    look(str(adapter), revision="v8")  # a folder has no revision: it is the base's
    look(str(adapter), base="org/base")
    look(str(adapter), base=str(llama.folder))
    assert asked == [("org/base", "v8", None), ("org/base", "v7", None)]
    with pytest.raises(UsageError, match="has no revisions"):
        look(str(adapter), base=str(llama.folder), revision="v8")


def test_a_base_in_gguf(llama, tmp_path):
    """It is converted beside the result, and nothing of it stays but its history."""
    from tests.sources.test_gguf import write_gguf

    path = write_gguf(llama, tmp_path / "base.gguf", "F16")
    adapter = adapt(llama, tmp_path / "adapter")
    merged = read(str(adapter), tmp_path / "work" / "model", base=str(path))
    assert [entry["step"] for entry in merged.lineage] == ["gguf", "adapter"] and merged.dtype == "float16"
    assert merged.lineage[1]["base"]["digest"] == merged.lineage[0]["digest"]
    assert [each.name for each in merged.folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["body", "output layer", "table"],
)  # fmt: skip
def test_the_shape_is_that_of_what_is_merged(llama, tmp_path, options):
    """A tied table that is changed on one side becomes two."""
    adapter = adapt(llama, tmp_path / "adapter", **options)
    seen, merged = peek(str(adapter)), read(str(adapter), tmp_path / "work" / "model")
    assert seen.shape.tied == (not options) and seen.shape.adapter
    assert replace(seen.shape, adapter=0, size=0) == replace(peek(str(merged.folder)).shape, size=0)
    assert seen.shape.size == pytest.approx(merged.weight_bytes, rel=1e-3)  # but for a name in the header
    assert seen.file == llama.folder / "model.safetensors"
    planned = plan_ship(Recipe(source=str(adapter)), tmp_path / "out")
    assert planned.steps[0].cost.kept == seen.shape.size + seen.shape.files
    plain = plan_ship(Recipe(source=str(llama.folder)), tmp_path / "out").steps[0].cost
    assert planned.predicted and planned.steps[0].cost.memory > plain.memory


def test_what_is_known_of_an_adapter_before_its_base_is(adapter, llama, tmp_path):
    from tests.sources.test_gguf import write_gguf

    change(adapter, base_model_name_or_path="nobody/no-model")
    assert peek(str(adapter)).reason == "nobody/no-model is not downloaded yet"
    packed = peek(str(adapter), base=str(write_gguf(llama, tmp_path / "base.gguf", "F16")))
    assert packed.shape.unpacked and packed.shape.adapter
    change(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(UnsupportedError, match="is an adapter itself"):
        plan_ship(Recipe(source=str(adapter)), tmp_path / "out")


def test_an_adapter_ships_and_is_evaluated(adapter, llama, tmp_path):
    """To int8: the manifest says what was merged into what, the answers are the adapter's, not the base's."""
    change(adapter, base_model_name_or_path="org/not-here")
    recipe = Recipe(source=str(adapter), base=str(llama.folder), accept=("kld<=0.5",))
    bundle = ship(recipe, tmp_path / "out" / "int8")
    source = bundle.manifest["source"]
    assert source["lineage"][-1]["base"] == {"source": llama.folder.name, "revision": None, "digest": llama.digest()}
    assert source["lineage"][-1]["digest"] == Checkpoint(adapter).digest()
    assert (bundle.manifest["recipe"]["source"], bundle.manifest["recipe"]["base"]) == ("adapter", llama.folder.name)
    assert f"the adapter adapter merged into {llama.folder.name}" in bundle.report.meta["source"]
    assert str(tmp_path) not in (bundle.folder / "manifest.json").read_text()

    scorer = open_scorer(bundle.target_folder("openvino"), EXACT)
    found = torch.from_numpy(scorer.logits(TOKENS.numpy(), np.ones_like(TOKENS.numpy())))
    assert (found - of_peft(llama, adapter)).abs().mean() < 0.1 * (found - logits(llama.load())).abs().mean()

    arguments = [bundle.folder, adapter, "--base", llama.folder, "--json"]
    report = json.loads(CliRunner().invoke(evaluate_command, [*map(str, arguments)], catch_exceptions=False).stdout)
    kld = next(metric["value"] for metric in report["metrics"] if metric["name"] == "kld")
    assert kld == pytest.approx(bundle.report.get("kld").value, rel=1e-3)
    assert "is not the model" not in report["meta"]["verdict"]
    with pytest.raises(SourceError, match="org/not-here"):
        evaluate(bundle.folder, str(adapter))


def test_a_changed_adapter_redoes_the_run(adapter, llama, tmp_path):
    recipe = Recipe(source=str(adapter), base=str(llama.folder), name="tuned", out=str(tmp_path / "bundle"),
                    precision=Precision(name="fp32"))  # fmt: skip

    def again():
        """What the bundle says of its model, the last word, and how many stages were found done."""
        lines = []
        bundle = run(recipe, runs=tmp_path / "runs", progress=lines.append)
        return bundle.manifest["source"], lines[-1], lines.count("      done before")

    first, _, _ = again()
    same, word, found = again()
    assert same == first and found == 8 and word.startswith("nothing to do")
    rewrite(adapter, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    second, _, found = again()
    assert found == 0 and second["digest"] != first["digest"]
    before, after = first["lineage"][-1], second["lineage"][-1]
    assert after["digest"] != before["digest"] and after["base"] == before["base"]
    assert not list((tmp_path / "runs" / "tuned").glob("01-read-*/.*"))  # nothing half written


def test_what_a_stage_depends_on(adapter, llama, tmp_path):
    base = Path(shutil.copytree(llama.folder, tmp_path / "base"))
    first = look(str(adapter), base=str(base)).depends
    assert first == {"source": "adapter", "revision": None, "digest": Checkpoint(adapter).digest(),
                     "base": {"source": "base", "revision": None, "digest": llama.digest()}}  # fmt: skip
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert look(str(adapter), base=str(base)).depends["base"] != first["base"]
    rewrite(adapter, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert look(str(adapter), base=str(base)).depends["digest"] != first["digest"]
    assert look(str(base)).depends is None  # read where it lies


def test_a_base_is_not_replaced(adapter, llama, tmp_path):
    with pytest.raises(UsageError, match="holds the source"):
        ship(Recipe(source=str(adapter), base=str(llama.folder)), llama.folder, force=True)


def test_a_bundle_does_not_tell_where_the_base_lies(adapter, llama):
    shown = published(Recipe(source=str(adapter), base=str(llama.folder)))
    assert (shown.source, shown.base) == ("adapter", llama.folder.name)
    assert published(Recipe(source="a/b", base="org/base")).base == "org/base"
