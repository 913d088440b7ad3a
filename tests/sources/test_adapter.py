"""Adapters: merged exactly as PEFT computes them, or refused with the reason; never half, never silently."""

import json
import shutil
import time
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
from lightship.errors import SourceError, UnsafeSource, UnsupportedError, UsageError
from lightship.papers import published
from lightship.pipeline import evaluate, plan_ship, run, ship
from lightship.recipe import Precision, Recipe
from lightship.sources import adapter as adapters
from lightship.sources import huggingface, look, peek, read
from lightship.targets.openvino import open_scorer
from tests.tiny import tiny_gpt2, tiny_llama

# peft warns of all that it guesses; we compare figures
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

TOKENS = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3))
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Bases in float64. Merged and not merged, the same sums are added in another order; in float32 that alone moves
    the logits by 3e-5, in float64 by 3e-14."""
    folder = tmp_path_factory.mktemp("exact")
    bases = {
        "llama": tiny_llama(folder / "llama"),
        "untied": tiny_llama(folder / "untied", tie_word_embeddings=False),
        "gpt2": tiny_gpt2(folder / "gpt2"),
    }
    for base in bases.values():
        model = base.load("float64")
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # zero in a fresh model, which would hide that they are kept
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(base.folder)
    return bases


def adapt(base, folder, **options):
    """A LoRA adapter made by PEFT, every trained tensor moved by noise: B starts as zero, which would hide all."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    model = get_peft_model(base.load(), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base.folder))
    return folder


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def of_peft(base, adapter):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base.load(), adapter))


def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def assert_merged(merged, base, adapter):
    """In float64 the same logits as PEFT's, which are not the base's."""
    expected = of_peft(base, adapter)
    assert expected.dtype == merged.dtype == torch.float64
    assert (expected - logits(base.load())).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), expected, atol=1e-11, rtol=0)


# ── As PEFT computes it ─────────────────────────────────────────────────────

LLAMA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.self_attn\.v_proj": 6},
                 "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "q_proj": 3}},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layers\.1.*(up|down)_proj"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a whole name": {"target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "norms saved": {"modules_to_save": ["input_layernorm"]},
}  # fmt: skip


@pytest.mark.parametrize("options", LLAMA.values(), ids=LLAMA)
def test_llama_as_peft_computes_it(exact, tmp_path, options):
    adapter = adapt(exact["llama"], tmp_path / "adapter", **options)
    merged = read(str(adapter), tmp_path / "work" / "model").load()
    assert_merged(merged, exact["llama"], adapter)
    assert tied(merged)


GPT2 = {
    "fused": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "wrong word": {"target_modules": ["c_attn"], "fan_in_fan_out": False},  # PEFT believes the layer too
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    "every bias": {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    "its biases": {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    "bias of B": {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    "positions": {"target_modules": ["wpe"]},
}


@pytest.mark.parametrize("options", GPT2.values(), ids=GPT2)
def test_gpt2_as_peft_computes_it(exact, tmp_path, options):
    adapter = adapt(exact["gpt2"], tmp_path / "adapter", **options)
    merged = read(str(adapter), tmp_path / "work" / "model").load()
    assert_merged(merged, exact["gpt2"], adapter)
    assert tied(merged)


TABLES = {
    "head only": {"target_modules": ["lm_head"]},
    "table only": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", ["llama", "untied"])
def test_the_embedding_table_and_the_output_layer(base, exact, tmp_path, options):
    """Where the base ties them and the adapter changed one, PEFT computes with two; so does what is merged."""
    adapter = adapt(exact[base], tmp_path / "adapter", **options)
    merged = read(str(adapter), tmp_path / "work" / "model")
    assert_merged(merged.load(), exact[base], adapter)
    assert not tied(merged.load()) and merged.config["tie_word_embeddings"] is False


@pytest.mark.parametrize("settings", [{"target_modules": "all-linear"}, {"target_modules": ".*_proj"},
                                      {"layers_to_transform": 1, "layers_pattern": ["layers"]}])  # fmt: skip
def test_settings_that_peft_rewrites_when_it_saves(exact, tmp_path, settings):
    """Adapters that were not saved by PEFT have them."""
    made = {"layers_to_transform": [1]} if "layers_to_transform" in settings else {"target_modules": "all-linear"}
    adapter = adapt(exact["llama"], tmp_path / "adapter", **made)
    change(adapter, **settings)
    assert_merged(read(str(adapter), tmp_path / "work" / "model").load(), exact["llama"], adapter)


def test_bf16_stays_bf16_and_is_rounded_once(llama, tmp_path):
    """Bit for bit PEFT's own merge; and the nearest bf16 number to the sum in float64."""
    from peft import PeftModel

    base = Checkpoint(shutil.copytree(llama.folder, tmp_path / "half"))
    llama.load("bfloat16").save_pretrained(base.folder)
    adapter = adapt(base, tmp_path / "adapter", target_modules="all-linear")
    merged = read(str(adapter), tmp_path / "work" / "model")
    assert merged.dtype == "bfloat16"
    ours = merged.load().state_dict()
    theirs = PeftModel.from_pretrained(base.load(), adapter).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = "model.layers.1.self_attn.q_proj"
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = (load_file(base.folder / "model.safetensors")[f"{name}.weight"].double() + 8 / 4 * b @ a).bfloat16()
    assert (ours[f"{name}.weight"] == exact).float().mean() > 0.999  # float32 may fall on the other side of a tie


# ── A base that does not fit, or is not there ───────────────────────────────


def refused(kind, says, source, tmp_path, **options):
    """Refused with these words, nothing left behind."""
    with pytest.raises(kind) as caught:
        read(str(source), tmp_path / "work" / "model", **options)
    for words in [says] if isinstance(says, str) else says:
        assert words in str(caught.value)
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())


@pytest.fixture
def adapter(llama, tmp_path):
    return adapt(llama, tmp_path / "adapter")


def test_a_base_of_another_size(adapter, tmp_path):
    other = tiny_llama(tmp_path / "other", hidden_size=32)
    says = ["does not fit other", "layers.0.self_attn.q_proj.lora_A.weight: expected 4×32, found 4×64",
            "8 mistakes", "--base"]  # fmt: skip
    refused(SourceError, says, adapter, tmp_path, base=str(other.folder))


def test_a_base_of_another_architecture(adapter, exact, tmp_path):
    says = ["does not fit gpt2", "layers.0.self_attn.q_proj.lora_A.weight: expected nothing, found 4×64", "--base"]
    refused(SourceError, says, adapter, tmp_path, base=str(exact["gpt2"].folder))


def test_a_base_with_more_layers(adapter, tmp_path):
    """PEFT would leave the third layer as it is, and only warn."""
    other = tiny_llama(tmp_path / "other", num_hidden_layers=3)
    says = "model.layers.2.self_attn.q_proj.lora_A.weight: expected 4×64, found nothing"
    refused(SourceError, says, adapter, tmp_path, base=str(other.folder))


def drop(word):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


def add(name):
    return lambda tensors: {**tensors, name: torch.zeros(4, 64)}


def integers(tensors):
    return {name: tensor.to(torch.int8) for name, tensor in tensors.items()}


LAYER = "base_model.model.model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop("layers.1.self_attn.v_proj"), "v_proj.lora_A.weight: expected 4×64, found nothing"),
        (drop("layers.1.self_attn.v_proj.lora_B"), "v_proj.lora_B.weight: expected 32×4, found nothing"),
        (add(f"{LAYER}.o_proj.lora_A.weight"), "o_proj.lora_A.weight: expected nothing, found 4×64"),
        (add("base_model.model.model.norm.weight"), "model.norm.weight: expected nothing, found 4×64"),
        (add("base_model.model.lm_head.weight"), "lm_head.weight: expected 512×64, found 4×64"),
        (add("model.layers.0.self_attn.q_proj.lora_A.weight"), "expected floats with names below base_model.model."),
        (add(f"{LAYER}.q_proj.lora_C.weight"), "lora_C.weight: expected nothing"),
        (add(f"{LAYER}.q_proj.lora_magnitude_vector"), "lora_magnitude_vector: expected nothing"),
        (integers, "torch.int8"),
        (lambda tensors: {}, "holds no tensor"),
    ],
)
def test_no_tensor_is_dropped_and_none_is_missing(adapter, tmp_path, edit, says):
    rewrite(adapter, edit)
    refused(SourceError, says, adapter, tmp_path)


def test_a_parameter_that_the_settings_do_not_announce(llama, tmp_path):
    adapter = adapt(llama, tmp_path / "adapter", modules_to_save=["input_layernorm"])
    change(adapter, modules_to_save=None)
    refused(SourceError, "input_layernorm.weight: expected nothing, found 64", adapter, tmp_path)
    change(adapter, modules_to_save=["input_layernorm", "post_attention_layernorm"])
    refused(SourceError, "post_attention_layernorm.weight: expected 64, found nothing", adapter, tmp_path)


@pytest.mark.parametrize("name", [None, "", "/nowhere/on/this/machine", "nothing"])
def test_no_base_to_be_had(adapter, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(adapter, base_model_name_or_path=name)
    refused(SourceError, ["base", "--base PATH|HUB_ID"], adapter, tmp_path)


def test_a_hub_base_that_cannot_be_fetched(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change(adapter, base_model_name_or_path="nobody/nothing")
    refused(SourceError, ["the base of adapter", "HF_HUB_OFFLINE", "or name it with --base"], adapter, tmp_path)


def test_a_model_needs_no_base(llama, tmp_path):
    refused(UsageError, "whole model", llama.folder, tmp_path, base=str(llama.folder))


def test_an_adapter_on_an_adapter(adapter, tmp_path):
    refused(UnsupportedError, "an adapter itself", adapter, tmp_path, base=str(adapter))


# ── Adapters that are not merged ────────────────────────────────────────────


def test_other_methods(llama, tmp_path):
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    for name, config in (
        ("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ("ia3", IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
    ):
        get_peft_model(llama.load(), config).save_pretrained(tmp_path / name)
        refused(UnsupportedError, ["peft_type is", "only LORA"], tmp_path / name, tmp_path, base=str(llama.folder))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base itself"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"use_qalora": True}, "use_qalora"),
        ({"from_the_future": {"x": 1}}, "from_the_future: set, and not known"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"task_type": "SEQ_CLS"}, "expected CAUSAL_LM"),
        ({"target_modules": None}, "no target_modules"),
    ],
)
def test_settings_that_would_not_be_exact(adapter, tmp_path, entries, says):
    change(adapter, **entries)
    refused(UnsupportedError, says, adapter, tmp_path)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"r": 0}, "r: "),
        ({"r": "many"}, "r: "),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"bias": "some"}, "bias"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": "("}, "a pattern that cannot be used"),
        ({"rank_pattern": {"q_proj": 2}}, "expected 2×64, found 4×64"),
    ],
)
def test_settings_that_are_wrong(adapter, tmp_path, entries, says):
    change(adapter, **entries)
    refused(SourceError, says, adapter, tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("settings", [{"target_modules": "PATTERN"}, {"exclude_modules": "PATTERN"},
                                      {"rank_pattern": {"PATTERN": 4}}, {"alpha_pattern": {"PATTERN": 4}}])  # fmt: skip
def test_a_pattern_that_needs_for_ever(adapter, tmp_path, monkeypatch, settings):
    """Each character can be matched in two ways, and no name ends in `!`: 2 to the length of the name attempts."""
    monkeypatch.setattr(adapters, "PATTERN_SECONDS", 1.0)
    change(adapter, **json.loads(json.dumps(settings).replace("PATTERN", r"(?:[a-z0-9_.]|[^!])*!")))
    began = time.monotonic()
    refused(SourceError, "a pattern that needs more than 1 s", adapter, tmp_path)
    assert time.monotonic() - began < 20


def test_no_code_named_by_the_settings_is_imported(adapter, tmp_path, monkeypatch):
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    change(adapter, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"},
           megatron_core="evil_library")  # fmt: skip
    assert read(str(adapter), tmp_path / "work" / "model").load() is not None


def test_pickled_damaged_and_missing_weights(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for keep in (0, 5, 100, -1):
        path.write_bytes(whole[:keep])
        refused(SourceError, "fetch it again", adapter, tmp_path)
    path.unlink()
    refused(SourceError, "lacks adapter_model.safetensors", adapter, tmp_path)
    (adapter / "adapter_model.bin").write_bytes(b"PK\x03\x04" + b"0" * 50)
    refused(UnsafeSource, "pickled weights", adapter, tmp_path)


def test_a_folder_with_a_model_and_an_adapter(adapter, llama, tmp_path):
    shutil.copytree(llama.folder, adapter, dirs_exist_ok=True)
    refused(UnsupportedError, "holds a model and an adapter", adapter, tmp_path)


def test_embeddings_that_were_resized(llama, tmp_path):
    adapter = adapt(llama, tmp_path / "adapter", modules_to_save=["lm_head", "embed_tokens"])

    def wider(tensors):
        tables = [name for name in tensors if "lm_head" in name or "embed_tokens" in name]
        return {**tensors, **{name: torch.cat([tensors[name], tensors[name][:3]]) for name in tables}}

    rewrite(adapter, wider)
    refused(SourceError, ["expected 512×64, found 515×64", "resized in training"], adapter, tmp_path)


def test_values_that_overflow(adapter, tmp_path):
    rewrite(adapter, lambda tensors: {name: tensor * 1e30 for name, tensor in tensors.items()})
    refused(SourceError, "not finite", adapter, tmp_path)


# ── Tokenizer, lineage, the hub, the pipeline ───────────────────────────────


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
