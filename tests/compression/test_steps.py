"""The contract of every step: it works on each kind of model or says why not; the same input gives the same bytes."""

from __future__ import annotations

import pytest
import torch

from lightship.checkpoint import Checkpoint
from lightship.errors import UnsupportedError, UsageError
from lightship.find import names
from lightship.step import make_step, step_class
from tests.compression.context import context
from tests.tiny import tiny_encoder, tiny_gpt2, tiny_llama, tiny_seq2seq

MODELS = ("llama", "gemma3", "gpt2", "bert", "t5")


def gemma3(folder):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    from tests.tiny import tiny_tokenizer

    vocabulary = tiny_tokenizer(folder)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=2048, initializer_range=0.25, vocab_size=vocabulary, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_llama(made / "llama"),
        "gemma3": gemma3(made / "gemma3"),
        "gpt2": tiny_gpt2(made / "gpt2"),
        "bert": tiny_encoder(made / "bert", "BertForSequenceClassification"),
        "t5": tiny_seq2seq(made / "t5", "t5"),
    }


def outputs(checkpoint, given):
    model = checkpoint.load("float32")
    inputs = {name: torch.from_numpy(values) for name, values in given.batches[0].items()}
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("name", names("compression"))
@pytest.mark.parametrize("kind", MODELS)
def test_it_works_or_says_why_not(models, kind, name, tmp_path):
    checkpoint, step = models[kind], make_step(name, {})
    given = context(checkpoint)
    try:
        step.refuse(checkpoint.config)
        made = step.apply(checkpoint, tmp_path / "made", given)
    except UnsupportedError as error:
        assert error.message and error.hint, "a refusal says why and what to do"
        return
    assert made.lineage[-1]["step"] == name and made.lineage[-1]["options"] == step.model_dump(mode="json")
    again = step.apply(checkpoint, tmp_path / "again", context(checkpoint))
    assert again.digest() == made.digest() != checkpoint.digest()
    assert made.dtype == checkpoint.dtype
    if name != "vocabulary":  # which changes what the ids mean
        assert torch.isfinite(outputs(made, given)).all()


@pytest.mark.parametrize("name", names("compression"))
def test_every_option_has_a_meaning(name):
    kind = step_class(name)
    assert kind.__doc__
    assert all(field.description for field in kind.model_fields.values())


def test_an_unknown_option_is_an_error():
    with pytest.raises(UsageError, match="did you mean 'sparsity'"):
        make_step("magnitude", {"sparcity": "0.5"})
    with pytest.raises(UsageError, match=r"less than 1, received '1\.5'"):
        make_step("magnitude", {"sparsity": "1.5"})
