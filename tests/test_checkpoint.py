"""One loader: what it accepts, what it refuses, and that a cut model computes what the uncut one would."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lightship.checkpoint import Checkpoint, save
from lightship.errors import MissingExtra, SourceError, UnsupportedError, UsageError
from lightship.structure import Structure, structure_of
from tests.tiny import tiny_gpt2, tiny_llama

IDS = torch.arange(1, 41).reshape(2, 20)
HEAD = 16  # head_dim of the tiny llama: 64 / 4
WHOLE = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CUT = {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def copy(llama, tmp_path):
    return Checkpoint(shutil.copytree(llama.folder, tmp_path / "copy"))


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def cut_by_hand(checkpoint):
    """Layer 1 loses MLP channels 10..41 and its second key-value group (query heads 2 and 3)."""
    prefix = "model.layers.1."
    channels = torch.tensor([each for each in range(128) if not 10 <= each < 42])
    state = load_file(checkpoint.folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        state[f"{prefix}mlp.{name}.weight"] = state[f"{prefix}mlp.{name}.weight"][channels].clone()
    state[f"{prefix}mlp.down_proj.weight"] = state[f"{prefix}mlp.down_proj.weight"][:, channels].clone()
    for name, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        key = f"{prefix}self_attn.{name}.weight"
        state[key] = state[key][: heads * HEAD].clone()
    key = f"{prefix}self_attn.o_proj.weight"
    state[key] = state[key][:, : 2 * HEAD].clone()
    save_file(state, checkpoint.folder / "model.safetensors", metadata={"format": "pt"})
    structure = {"version": 1, "layers": [WHOLE, CUT]}
    (checkpoint.folder / "structure.json").write_text(json.dumps(structure))


def zeroed(checkpoint):
    """The uncut model with the same channels and heads contributing nothing."""
    model = checkpoint.load()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 10:42] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * HEAD :] = 0
    return model


def test_a_cut_model_computes_what_the_zeroed_one_does(llama, copy):
    cut_by_hand(copy)
    found, expected = logits(copy.load()), logits(zeroed(llama))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - logits(llama.load())).abs().max() > 0.1  # the cut is visible, so the equality above means something


def test_a_cut_model_generates_with_a_cache(copy):
    """Layers of one and of two key-value heads share one cache."""
    cut_by_hand(copy)
    model = copy.load()
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    with_cache = model.generate(IDS, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS, attention_mask=mask, use_cache=False, **options))


def test_a_cut_model_keeps_ties_dtype_and_mode(copy):
    cut_by_hand(copy)
    model = copy.load("bfloat16")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16} and not model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as in a model that was never cut


def test_a_cut_model_survives_saving(copy, tmp_path):
    cut_by_hand(copy)
    model = copy.load()
    saved = save(model, copy.folder, tmp_path / "saved", {"step": "width"})
    assert saved.structure == Structure([WHOLE, CUT]) == structure_of(model)
    assert torch.equal(logits(saved.load()), logits(model))


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        ([WHOLE], "1 layers"),
        ([WHOLE, {**CUT, "intermediate_size": 129}], "expected 1 to 128"),
        ([WHOLE, {**CUT, "intermediate_size": 0}], "layer 1"),
        ([WHOLE, {**CUT, "intermediate_size": True}], "layer 1"),
        ([WHOLE, {**CUT, "num_attention_heads": 3, "num_key_value_heads": 2}], "no multiple"),
        ([WHOLE, {"intermediate_size": 96}], "expected exactly"),
        ([WHOLE, []], "expected exactly"),
        ("x", "version"),
        ([WHOLE, WHOLE], "mismatched keys"),
    ],
)
def test_a_structure_that_cannot_be(copy, layers, word):
    cut_by_hand(copy)
    (copy.folder / "structure.json").write_text(json.dumps({"version": 1, "layers": layers}))
    with pytest.raises(SourceError, match=word):
        copy.load()


def test_a_structure_of_another_version(copy):
    (copy.folder / "structure.json").write_text(json.dumps({"version": 3, "layers": [WHOLE, WHOLE]}))
    with pytest.raises(SourceError, match="version 3"):
        copy.load()


@pytest.mark.parametrize(("kind", "drop", "add"), [("missing", 1, 0), ("unexpected", 0, 1)])
def test_a_cut_model_with_other_weights(copy, kind, drop, add):
    cut_by_hand(copy)
    path = copy.folder / "model.safetensors"
    state = load_file(path)
    if drop:
        del state["model.norm.weight"]
    if add:
        state["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"{kind} keys"):
        copy.load()


def test_a_structure_needs_llama_like_layers(tmp_path):
    gpt2 = Checkpoint(tiny_gpt2(tmp_path / "gpt2").folder)
    assert not structure_of(gpt2.load())
    change(gpt2.folder / "config.json", num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    structure = {"version": 1, "layers": [{**WHOLE, "num_key_value_heads": 4}] * 2}
    (gpt2.folder / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(UnsupportedError, match="llama-like"):
        gpt2.load()


def test_dtype_is_what_the_file_holds(llama, tmp_path):
    """A configuration that says bfloat16 over float32 weights must not round them."""
    model = llama.load()
    saved = save(model, llama.folder, tmp_path / "a", {"step": "copy"})
    change(saved.folder / "config.json", dtype="bfloat16")
    assert saved.dtype == "float32" and torch.equal(logits(saved.load()), logits(model))
    half = save(llama.load("bfloat16"), llama.folder, tmp_path / "b", {"step": "cast"})
    assert half.dtype == "bfloat16" and half.load().dtype == torch.bfloat16
    assert half.load("float32").dtype == torch.float32
    assert half.weight_bytes == pytest.approx(saved.weight_bytes / 2, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_tables_are_stored_once(tmp_path, tied):
    checkpoint = tiny_llama(tmp_path, tie_word_embeddings=tied)
    model = checkpoint.load()
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert isinstance(model, LlamaForCausalLM)


def test_saving_keeps_the_lineage_and_the_tokenizer(llama, tmp_path):
    model = llama.load()
    first = save(model, llama.folder, tmp_path / "one", {"step": "a", "options": {"share": 0.5}})
    second = save(model, first.folder, tmp_path / "two", {"step": "b", "source": "named"})
    assert [entry["step"] for entry in second.lineage] == ["a", "b"]
    assert second.lineage[0] == first.lineage[0] and second.lineage[0]["options"] == {"share": 0.5}
    assert second.lineage[0]["digest"] == llama.digest() and second.lineage[1]["digest"] == first.digest()
    assert second.lineage[1]["source"] == "named"
    assert set(second.lineage[1]) == {"step", "options", "source", "digest", "time"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (second.folder / name).read_bytes() == (llama.folder / name).read_bytes()
    assert second.eos_token_ids == llama.eos_token_ids == (0,) and not second.structure
    assert str(llama.folder) not in (second.folder / "config.json").read_text()


def test_saving_refuses_to_mix(llama, copy, tmp_path):
    model = llama.load()
    with pytest.raises(UsageError, match="not empty"):
        save(model, llama.folder, copy.folder, {"step": "a"})
    with pytest.raises(UsageError, match="step"):
        save(model, llama.folder, tmp_path / "new", {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "property_name"), [("vocab_size", "vocabulary"),
                                                     ("max_position_embeddings", "context_length")])  # fmt: skip
def test_a_configuration_that_does_not_say(copy, name, property_name):
    config = copy.config
    assert getattr(copy, property_name) == config.pop(name)
    (copy.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError):
        getattr(copy, property_name)


def test_gpt2_names_its_context_otherwise(tmp_path):
    gpt2 = tiny_gpt2(tmp_path)
    assert gpt2.context_length == 2048 and gpt2.vocabulary == gpt2.load().config.vocab_size


def test_eos_ids(copy):
    path = copy.folder / "generation_config.json"
    for value, expected in ((5, (5,)), ([5, 7], (5, 7)), (None, (0,)), (0, (0,))):
        change(path, eos_token_id=value)
        assert copy.eos_token_ids == expected
    path.unlink()
    change(copy.folder / "config.json", eos_token_id=[3])
    assert copy.eos_token_ids == (3,)


@pytest.mark.parametrize("text", ["{", "{}", '["x"]'])
def test_a_damaged_lineage(copy, text):
    (copy.folder / "lineage.json").write_text(text)
    with pytest.raises(SourceError, match=r"lineage\.json"):
        _ = copy.lineage


def test_quantised_weights_are_refused(copy):
    change(copy.folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match="already quantised"):
        copy.load()


def test_only_the_files_that_are_loaded_are_counted(copy):
    before = copy.weight_bytes
    shutil.copy(copy.folder / "model.safetensors", copy.folder / "consolidated.safetensors")
    assert copy.weight_bytes == before == (copy.folder / "model.safetensors").stat().st_size


def test_shards(copy):
    state = load_file(copy.folder / "model.safetensors")
    expected = logits(copy.load())
    (copy.folder / "model.safetensors").unlink()
    halves = {"a.safetensors": sorted(state)[:9], "b.safetensors": sorted(state)[9:]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, copy.folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (copy.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(copy.load()), expected) and copy.dtype == "float32"
    assert [path.name for path in copy.weight_files] == ["a.safetensors", "b.safetensors"]


def test_the_digest_sees_every_change(copy):
    before = copy.digest()
    assert before == copy.digest() and len(before) == 64
    (copy.folder / "notes.log").write_text("no part of the model")
    (copy.folder / "lineage.json").write_text("[]")  # tells when it was made, not what it is
    assert copy.digest() == before
    data = bytearray((copy.folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy.folder / "model.safetensors").write_bytes(data)
    assert copy.digest() != before


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, lightship.checkpoint, lightship.sources; "
        "sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_serving_installation_says_what_is_missing(llama, monkeypatch):
    monkeypatch.setattr("lightship.checkpoint.find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(MissingExtra, match="transformers") as caught:
        llama.load()
    assert caught.value.hint == 'pip install "lightship[build]"'
