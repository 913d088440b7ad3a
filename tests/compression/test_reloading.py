"""What steps leave is read again as it was, whatever a family calls its weights and scales its tables by."""

from __future__ import annotations

import json

import pytest
import torch

from lightship.compression._gradients import fisher
from lightship.errors import UsageError
from lightship.layers import linears
from lightship.recipe import Precision
from lightship.step import make_step
from lightship.targets import openvino
from tests.compression.context import context
from tests.matrix.families import make
from tests.tiny import tiny_encoder, tiny_llama, tiny_seq2seq


def mixtral(folder):
    """Experts whose weights transformers stacks as it reads them, and a router that is a linear layer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from lightship.checkpoint import Checkpoint
    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=tiny_tokenizer(folder), max_position_embeddings=256, initializer_range=0.25,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return Checkpoint(folder)


MADE = {
    "marian": lambda folder: tiny_seq2seq(folder, "marian"),
    "gpt-neox": lambda folder: make("gpt-neox", folder),
    "mixtral": mixtral,
}


@pytest.mark.parametrize("name", MADE)
def test_products_are_read_by_the_names_that_they_were_written_by(name, tmp_path):
    checkpoint = MADE[name](tmp_path / name)
    given = context(checkpoint)
    made = make_step("svd", {"keep": 0.9}).apply(checkpoint, tmp_path / "made", given)
    again = make_step("magnitude", {"sparsity": 0.0}).apply(made, tmp_path / "again", given)
    before, after = made.load("float32").state_dict(), again.load("float32").state_dict()
    assert before.keys() == after.keys() and any(key.endswith("reduce.weight") for key in before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    whole = checkpoint.load("float32").state_dict()
    changed = [key for key in whole if key in before and not torch.equal(whole[key], before[key])]
    assert not changed, "what is no product is as it was"


def test_settings_of_generation_go_through_every_step(tmp_path):
    checkpoint = tiny_llama(tmp_path / "llama")
    path = checkpoint.folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, 2, 3], "pad_token_id": 0, "do_sample": True, "temperature": 0.6}))
    for number, name in enumerate(("svd", "magnitude", "depth")):
        checkpoint = make_step(name, {}).apply(checkpoint, tmp_path / str(number), context(checkpoint))
        assert checkpoint.eos_token_ids == (0, 2, 3)
        assert json.loads((checkpoint.folder / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_scaled_table_stays_scaled(tmp_path):
    """mBART multiplies what it looks up by √64."""
    checkpoint = tiny_seq2seq(tmp_path / "mbart", "mbart", scale_embedding=True)
    made = make_step("svd", {"keep": 0.9, "embedding": 0.9}).apply(checkpoint, tmp_path / "made", context(checkpoint))
    ids = torch.arange(200)[None]
    before, after = (each.load("float32").get_input_embeddings()(ids).detach().norm() for each in (checkpoint, made))
    assert float(after / before) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", ["mbart", "marian", "pegasus"])
def test_layers_of_an_encoder_without_a_cache(name, tmp_path):
    checkpoint = tiny_seq2seq(tmp_path / name, name, encoder_layers=3)
    step = make_step("depth", {"layers": "1"})
    model = step.apply(checkpoint, tmp_path / "made", context(checkpoint)).load()
    assert len(model.get_encoder().layers) == 2
    assert all(layer.self_attn.layer_idx is None for layer in model.get_encoder().layers)


def test_labels_that_are_answers_of_their_own(tmp_path):
    """In the direction in which all of them rise together a softmax over them knows nothing; each by itself does."""
    checkpoint = tiny_encoder(tmp_path / "bert", "BertForSequenceClassification", num_labels=6,
                              problem_type="multi_label_classification")  # fmt: skip
    model = checkpoint.load("float32")
    given = context(checkpoint, rows=64)
    found = fisher(model, {"classifier": model.classifier}, given.batches, 0)["classifier"]
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(values) for name, values in given.batches[0].items()}
        p = model(**inputs).logits.double().sigmoid()
    expected = (p * (1 - p)).mean(0) / (6 * 64)  # over the answers, and over the tokens read: one a text
    torch.testing.assert_close(found.diagonal(), expected, rtol=0.5, atol=0)
    together = torch.ones(6, dtype=torch.float64)
    assert float(together @ found @ together) > 0.3 * float(expected.sum())


def test_a_share_without_a_rank_is_refused(tmp_path):
    checkpoint = tiny_llama(tmp_path / "llama")
    with pytest.raises(UsageError, match="leaves no layer a rank"):
        step = make_step("svd", {"keep": 0.2, "allocation": "uniform", "multiple": 64})
        step.apply(checkpoint, tmp_path / "made", context(checkpoint))


@pytest.mark.parametrize("tied", [True, False])
def test_four_bits_after_tables_of_low_rank(tmp_path, tied):
    """The head's narrow factor is a matrix of the body: it is fitted like the others."""
    checkpoint = tiny_llama(tmp_path / "llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    step = make_step("svd", {"keep": 0.9, "multiple": 32, "embedding": 0.7})
    made = step.apply(checkpoint, tmp_path / "made", context(checkpoint))
    assert "lm_head.reduce" not in linears(made.load())
    openvino.export(made, tmp_path / "exported", "float32")
    rows = [row.tolist() for row in context(made, rows=40, length=64).batches[0]["input_ids"]]
    openvino.quantise(tmp_path / "exported", tmp_path / "int4", Precision(name="int4", group_size=32), rows, made)
    assert (tmp_path / "int4/openvino_model.bin").stat().st_size < 0.3 * made.weight_bytes
