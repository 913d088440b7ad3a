"""A GGUF file is the model it was made from: reloaded it says the same, at every precision as near as its limit."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lightship.checkpoint import Checkpoint
from lightship.cli.convert import command
from lightship.errors import UnsupportedError
from lightship.pipeline import plan_convert, ship
from lightship.recipe import Precision, Recipe
from lightship.targets import _gguf_model, gguf, pytorch
from tests.tiny import _trained, tiny_gpt2, tiny_llama, tiny_tokenizer

IDS = np.arange(1, 401).reshape(1, 400)  # long enough for a wrong RoPE base to show
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SAME, ANOTHER = 1e-3, 0.1  # of logits: rounding stays below the first, a mistake is above the second


def tiny(folder, model_type, **changes):
    """A llama or qwen2 of two layers whose norms and biases are not what they start as."""
    options = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.25,
        "vocab_size": tiny_tokenizer(folder) + 3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return Checkpoint(folder)


def sentencepiece_llama(folder, owner):
    """A llama whose tokenizer is of SentencePiece's kind, and loaded by the class `owner` of transformers."""
    tokens = Tokenizer.from_str(_trained("sentencepiece", 800))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    checkpoint = tiny(folder, "llama", vocab_size=803, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": owner}))
    return checkpoint


def difference(checkpoint, folder):
    """The largest difference of a logit between the checkpoint and the file in `folder`."""
    expected, found = (one.logits(IDS, np.ones_like(IDS))
                       for one in (pytorch.open_scorer(checkpoint.folder), gguf.open_scorer(folder)))  # fmt: skip
    return float(np.abs(expected - found).max())


def kinds(folder):
    """Name of each tensor → its type."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / gguf.FILE).tensors}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2", {"head_dim": 32}),
    ],
    ids=["llama", "heads", "base", "llama3", "linear", "qwen2", "qwen2-heads"],
)
def test_reloaded_it_is_the_same_model(model_type, changes, tmp_path):
    checkpoint = tiny(tmp_path, model_type, **changes)
    gguf.export(checkpoint, tmp_path / "out")
    assert difference(checkpoint, tmp_path / "out") < SAME
    found = kinds(tmp_path / "out")
    assert set(found.values()) == {"F32"}
    assert ("output.weight" in found) != changes.get("tie_word_embeddings", False)
    assert ("blk.0.attn_q.bias" in found) == (model_type == "qwen2")


@pytest.mark.parametrize("owner", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_llama_with_sentencepiece(owner, tmp_path):
    """transformers keeps the file as it is for the second, and makes its own of it for the first."""
    checkpoint = sentencepiece_llama(tmp_path / "llama", owner)
    gguf.export(checkpoint, tmp_path / "out")
    assert difference(checkpoint, tmp_path / "out") < SAME
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "out" / gguf.FILE).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.ggml.merges" not in fields and len(fields["tokenizer.ggml.scores"]) == 803
    assert len(gguf.remarks(tmp_path / "out")) == (owner == "LlamaTokenizer") * 2


@pytest.mark.parametrize("mistake", ["order", "base", "eps", "scaling"])
def test_a_mistake_shows(mistake, tmp_path, monkeypatch):
    """The comparison above proves something only if these make it fail."""
    checkpoint = tiny(tmp_path, "llama", rope_parameters=LLAMA3, rms_norm_eps=1e-2)
    rope_of = _gguf_model.rope_of
    if mistake == "order":
        monkeypatch.setattr(_gguf_model, "paired", lambda rows, heads: rows)
    elif mistake == "base":
        monkeypatch.setattr("gguf.GGUFWriter.add_rope_freq_base", lambda self, base: self.add_float32(
            "llama.rope.freq_base", 2 * base))  # fmt: skip
    elif mistake == "eps":
        monkeypatch.setattr("gguf.GGUFWriter.add_layer_norm_rms_eps", lambda self, eps: self.add_float32(
            "llama.attention.layer_norm_rms_epsilon", 1e-6))  # fmt: skip
    else:
        monkeypatch.setattr(_gguf_model, "rope_of", lambda config: {**rope_of(config), "rope_type": "default"})
    gguf.export(checkpoint, tmp_path / "out")
    assert difference(checkpoint, tmp_path / "out") > ANOTHER


def test_the_rotary_pairs_are_neighbours():
    rows = np.random.default_rng(0).normal(size=(3 * 8, 5)).astype(np.float32)
    found = _gguf_model.paired(rows, heads=3)
    for head in range(3):
        for pair in range(4):
            assert np.array_equal(found[head * 8 + 2 * pair], rows[head * 8 + pair])
            assert np.array_equal(found[head * 8 + 2 * pair + 1], rows[head * 8 + 4 + pair])


def test_the_factors_of_llama_3():
    """Against Meta's own code, number by number."""
    config = {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
              "head_dim": 128}  # fmt: skip
    expected = []
    for pair in range(64):
        frequency = 1 / 500000.0 ** (2 * pair / 128)
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            expected.append(1.0)
        elif wave > 8192 / 1:
            expected.append(8.0)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            expected.append(frequency / ((1 - smooth) * frequency / 8 + smooth * frequency))
    found = _gguf_model.llama3_factors(config)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found == 1).any() and (found == 8).any() and ((found > 1) & (found < 8)).any()


@pytest.mark.parametrize(("name", "levels"), [("q8_0", 127), ("q5_0", 16), ("q4_0", 8)])
def test_rounded_weights_are_within_a_step(name, levels, llama, tmp_path):
    gguf.export(llama, tmp_path / "floats")
    gguf.quantise(tmp_path / "floats", tmp_path / "out", Precision(name=name))
    floats = {each.name: each for each in GGUFReader(tmp_path / "floats" / gguf.FILE).tensors}
    for tensor in GGUFReader(tmp_path / "out" / gguf.FILE).tensors:
        given = np.array(floats[tensor.name].data, np.float64)
        found = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if given.ndim == 1:
            assert tensor.tensor_type.name == "F32" and np.array_equal(found, given)
            continue
        table = tensor.name == "token_embd.weight"
        assert tensor.tensor_type.name == ("Q8_0" if table else name.upper())
        for row, other in zip(given.reshape(-1, 32), found.reshape(-1, 32), strict=True):
            step = np.abs(row).max() / (127 if table else levels)
            assert np.abs(row - other).max() <= 1.01 * step


def test_what_has_no_whole_blocks_is_told(tmp_path):
    checkpoint = tiny(tmp_path, "llama", intermediate_size=80)
    gguf.export(checkpoint, tmp_path / "floats")
    gguf.quantise(tmp_path / "floats", tmp_path / "out", Precision(name="q8_0"))
    gguf.finish(tmp_path / "out", Precision(name="q8_0"))
    found = kinds(tmp_path / "out")
    assert (found["blk.0.ffn_down.weight"], found["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    told = gguf.remarks(tmp_path / "out")
    assert any("2 matrices are F16, not q8_0" in line and "blk.0.ffn_down.weight" in line for line in told)


def test_what_f16_cannot_hold_stays_f32(tmp_path):
    checkpoint = tiny(tmp_path, "llama")
    model = checkpoint.load()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 7e4
    model.save_pretrained(tmp_path)
    gguf.export(checkpoint, tmp_path / "floats")
    gguf.quantise(tmp_path / "floats", tmp_path / "out", Precision(name="f16"))
    gguf.finish(tmp_path / "out", Precision(name="f16"))
    found = kinds(tmp_path / "out")
    assert (found["blk.1.ffn_up.weight"], found["blk.0.ffn_up.weight"]) == ("F32", "F16")
    assert any("too large for F16" in line for line in gguf.remarks(tmp_path / "out"))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_16_bits_stay_as_they_are(dtype, kind, tmp_path):
    tiny(tmp_path, "qwen2").load(dtype).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    gguf.export(checkpoint, tmp_path / "out")
    assert kinds(tmp_path / "out")["blk.0.attn_q.weight"] == kind
    assert kinds(tmp_path / "out")["blk.0.attn_q.bias"] == "F32"
    assert difference(checkpoint, tmp_path / "out") < SAME


def test_what_the_file_says(tmp_path):
    """Every key that llama.cpp needs, and transformers makes the same tokenizer and template of it."""
    checkpoint = tiny(tmp_path, "llama", head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    gguf.export(checkpoint, tmp_path / "floats")
    gguf.quantise(tmp_path / "floats", tmp_path / "out", Precision(name="q8_0"))
    fields = GGUFReader(tmp_path / "out" / gguf.FILE).fields
    said = {key: field.contents() for key, field in fields.items()}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 7,
        "general.quantization_version": 2, "llama.block_count": 2, "llama.context_length": 1024,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 777.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: said.get(key) for key in expected} == expected
    assert len(said["tokenizer.ggml.tokens"]) == said["llama.vocab_size"] == checkpoint.vocabulary
    assert said["tokenizer.ggml.token_type"] == [3] * 4 + [1] * (checkpoint.vocabulary - 7) + [5] * 3
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=gguf.FILE),
                    AutoTokenizer.from_pretrained(tmp_path))  # fmt: skip
    for text in ("def f(x):\n    return  x ** 2", "<|user|>naïve 漢字 🚢<|end|>  "):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_convert_gates_and_tells(llama, tmp_path):
    """Through the command: no stage for a path that nothing here serves."""
    args = [str(llama.folder), "--target", "gguf", "-p", "q8_0", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["engine.json", "model.gguf"]
    assert "[6/6] gate gguf" in done.output and "served path" not in done.output
    assert "no engine for gguf here" in done.output and "GGUF tensors: 15 Q8_0, 5 F32" in done.output
    assert json.loads((tmp_path / "out" / "engine.json").read_text())["precision"] == "q8_0"


# ── What is refused, before any work ────────────────────────────────────────


def refusal(source, **given):
    with pytest.raises(UnsupportedError) as found:
        plan_convert(Recipe(source=str(source), **given), source / "out")
    return str(found.value)


def test_it_is_not_shipped(llama, tmp_path):
    for target in ("gguf", ("openvino", "gguf")):
        with pytest.raises(UnsupportedError, match=r"does not serve gguf(?s:.*)lightship convert --target gguf"):
            ship(Recipe(source=str(llama.folder), target=target, precision=Precision(name="fp32")), tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "name", "nearest"),
    [("gguf", "int8", "q8_0"), ("gguf", "int4", "q4_0"), ("openvino", "q8_0", "int8"), ("onnx", "q4_0", "int4"),
     (None, "q5_0", "int8"), ("openvino", "f16", "bf16")],
)  # fmt: skip
def test_precisions_of_others_are_refused(target, name, nearest, llama):
    assert f"--precision {nearest}" in refusal(llama.folder, target=target, precision=Precision(name=name))


def test_an_arithmetic_is_refused(llama):
    precision = Precision(name="q8_0", arithmetic="f32")
    assert "llama.cpp chooses" in refusal(llama.folder, target="gguf", precision=precision)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ],
)
def test_other_llamas_are_refused(changes, reason, tmp_path):
    tiny_llama(tmp_path, **changes)
    assert reason in refusal(tmp_path, target="gguf", precision=Precision(name="q8_0"))


def test_other_architectures_are_refused(tmp_path):
    tiny_gpt2(tmp_path)
    assert "not for 'gpt2'" in refusal(tmp_path, target="gguf", precision=Precision(name="q8_0"))


def test_sliding_windows_are_refused(tmp_path):
    tiny(tmp_path, "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0)
    assert "sliding windows" in refusal(tmp_path, target="gguf", precision=Precision(name="q8_0"))


def test_other_tokenizers_are_refused(tmp_path):
    tiny_llama(tmp_path)
    tiny_tokenizer(tmp_path, kind="unigram")
    assert "is written for BPE tokenizers" in refusal(tmp_path, target="gguf", precision=Precision(name="q8_0"))
