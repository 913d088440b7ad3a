"""A GGUF file becomes the model it was made from: weights, RoPE base, tokenizer, and the history of its precision."""

import hashlib
import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lightship.errors import SourceError, UnsupportedError
from lightship.sources import gguf, read

IDS = torch.arange(1, 401).reshape(1, 400)  # long enough for a wrong RoPE base to show
BLOCK = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def quiet(line):
    pass


def gguf_name(name):
    if name in TOP:
        return TOP[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{BLOCK[part]}.weight"


def interleaved(weight, heads):
    """llama.cpp's order of the rotary pairs in q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(checkpoint, path, kind, *, leave_out=(), extra=None, change=lambda writer: None):
    """The tiny llama as llama.cpp would write it: matrices of type `kind`, norms F32."""
    config, tokenizer = checkpoint.config, json.loads((checkpoint.folder / "tokenizer.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if each < 4 else 1 for each in range(len(vocabulary))])
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template((checkpoint.folder / "chat_template.jinja").read_text())
    change(writer)
    for name, tensor in load_file(checkpoint.folder / "model.safetensors").items():
        if gguf_name(name) in leave_out:
            continue
        weight = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        stored = GGMLQuantizationType.F32 if weight.ndim == 1 else GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(weight), stored), raw_dtype=stored)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def logits(checkpoint):
    return checkpoint.load("float32")(input_ids=IDS).logits


def distance(checkpoint, original):
    """Mean absolute error of the logits, relative to their mean size."""
    expected = logits(original)
    return float((logits(checkpoint) - expected).abs().mean() / expected.abs().mean())


def test_the_distance_sees_a_wrong_rope_base(llama, tmp_path):
    checkpoint = read(str(write_gguf(llama, tmp_path / "tiny.gguf", "F32")), tmp_path / "out", log=quiet)
    config = checkpoint.config
    config["rope_parameters"]["rope_theta"] *= 50
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    assert distance(checkpoint, llama) > 0.5  # far beyond every limit below


@pytest.mark.parametrize(
    ("kind", "dtype", "limit"),
    [("F32", "float32", 1e-6), ("F16", "float16", 0.01), ("BF16", "bfloat16", 0.05), ("Q8_0", "float32", 0.15)],
)
def test_the_model_comes_back(llama, tmp_path, kind, dtype, limit):
    path = write_gguf(llama, tmp_path / "tiny.gguf", kind)
    said = []
    checkpoint = read(str(path), tmp_path / "out", log=said.append)
    assert checkpoint.dtype == dtype == str(checkpoint.load().dtype).removeprefix("torch.")
    assert distance(checkpoint, llama) <= limit
    assert said == [f"GGUF tensors: 15 {kind}, 5 F32"] or said == ["GGUF tensors: 20 F32"]


def test_quantised_matrices_are_what_the_format_says(llama, tmp_path):
    """Against gguf's own slow reference; v_proj is the matrix that no reordering touches."""
    path = write_gguf(llama, tmp_path / "tiny.gguf", "Q4_0")
    found = load_file(read(str(path), tmp_path / "out", log=quiet).folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    original = load_file(llama.folder / "model.safetensors")[name].numpy()
    kind = GGMLQuantizationType.Q4_0
    np.testing.assert_array_equal(found[name].numpy(), dequantize(quantize(original, kind), kind))
    assert "lm_head.weight" not in found


def test_lineage_configuration_and_tokenizer(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "tiny.gguf", "Q8_0")
    checkpoint = read(str(path), tmp_path / "out", log=quiet)
    entry = checkpoint.lineage[0]
    assert entry["precision"] == {"Q8_0": 15, "F32": 5} and entry["source"] == "tiny.gguf" and entry["step"] == "gguf"
    assert entry["digest"] == hashlib.sha256(path.read_bytes()).hexdigest() and entry["bytes"] == path.stat().st_size
    assert {"step", "options", "source", "digest", "time"} <= set(entry)
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert str(tmp_path) not in json.dumps(config) and not config.get("_name_or_path")
    assert (checkpoint.context_length, checkpoint.vocabulary, checkpoint.eos_token_ids) == (
        2048,
        llama.vocabulary,
        (0,),
    )
    ours, theirs = (AutoTokenizer.from_pretrained(each.folder) for each in (checkpoint, llama))
    text = "A for statement, with  spaces, ümläute and 12 numbers."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)


def test_a_missing_tensor_is_no_random_tensor(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "tiny.gguf", "F32", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(SourceError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        read(str(path), tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()


def scaled(writer):
    writer.add_string("llama.rope.scaling.type", "yarn")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rotary"),
        ({"change": scaled}, "rotary"),
        ({"change": lambda writer: writer.add_uint16("split.count", 3)}, "one of 3 parts"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(llama, tmp_path, options, word):
    path = write_gguf(llama, tmp_path / "tiny.gguf", "F32", **options)
    with pytest.raises(UnsupportedError, match=word):
        read(str(path), tmp_path / "out", log=quiet)


def test_scaling_none_is_no_scaling(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "tiny.gguf", "F32",
                      change=lambda writer: writer.add_string("llama.rope.scaling.type", "none"))  # fmt: skip
    assert torch.allclose(logits(read(str(path), tmp_path / "out", log=quiet)), logits(llama), atol=1e-3)


@pytest.mark.timeout(60)
def test_an_array_longer_than_the_file_ends_at_once(llama, tmp_path):
    """gguf's own reader loops over the claimed length of an array of bytes, past the end of the file."""
    path = tmp_path / "tiny.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"a"
    array_of_bytes = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    path.write_bytes(head + key + array_of_bytes)
    with pytest.raises(SourceError, match="cut short"):
        gguf.tensor_types(path)


def test_reading_is_quiet(llama, tmp_path, capfd):
    read(str(write_gguf(llama, tmp_path / "tiny.gguf", "F16")), tmp_path / "out", log=quiet)
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def test_no_cut_and_no_flipped_header_byte_escapes_the_error_tree(llama, tmp_path):
    """Hostile headers end in SourceError, or describe the same file; nothing else may come out of the check."""
    whole = write_gguf(llama, tmp_path / "tiny.gguf", "Q8_0").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for size in (*range(0, 64, 5), *range(64, len(whole), len(whole) // 12)):
        damaged.write_bytes(whole[:size])
        with pytest.raises(SourceError):
            gguf.tensor_types(damaged)
    random = np.random.default_rng(0)
    for place in (*range(4, 40), *random.integers(40, 600, 15)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.integers(8)
        damaged.write_bytes(flipped)
        try:
            gguf.tensor_types(damaged)
        except SourceError:
            continue


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ({"F16": 3, "F32": 2}, "float16"), ({"BF16": 3, "F32": 2}, "bfloat16"), ({"F32": 2}, "float32"),
        ({"Q4_1": 3, "F32": 2}, "float32"), ({"F16": 1, "Q4_K": 3}, "float32"), ({"F16": 1, "BF16": 1}, "float32"),
    ],
)  # fmt: skip
def test_the_dtype_loses_nothing(types, dtype):
    assert gguf.dtype_for(types) == dtype
