"""Adapters: merged exactly as PEFT computes them, or refused with the reason; never half, never silently."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from lightship.checkpoint import Checkpoint
from lightship.errors import SourceError, UnsafeSource, UnsupportedError, UsageError
from lightship.sources import adapter as adapters
from lightship.sources import read
from tests.sources.adapters import adapt, change, logits, of_peft, refused, rewrite
from tests.tiny import tiny_gpt2, tiny_llama

# peft warns of all that it guesses; we compare figures
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]


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
