"""Advice from measurement: what is tried, what it saves by the shapes, what cannot be tried is said."""

from __future__ import annotations

import json

import pytest

from lightship.advise_pipeline import Rounded, advise, compute, rounded_bytes
from tests.cli.test_cli import lightship
from tests.compression.context import context
from tests.tiny import tiny_encoder, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("small") / "llama", max_position_embeddings=128)


def test_sizes_from_the_headers(small):
    """Width 64, MLP 128, 4 heads over 2 of keys, 2 layers; the table of 512 is head and embedding in one."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert compute(small) == 2 * layer + 512 * 64
    norms = 5 * 64
    assert (
        rounded_bytes(small, 8, 0)
        == 2 * (layer + 2 * (64 * 2 + 32 * 2 + 128 * 2 + 64)) + 512 * 64 + 2 * 512 + 2 * norms
    )
    assert rounded_bytes(small, 4, 64) == 2 * (layer // 2 + 2 * layer // 64) + 512 * 64 + 2 * 512 + 2 * norms


def test_rounding_is_what_it_says(small, tmp_path):
    """Sixteen levels; the weight furthest from zero lies on the end with one level more, so the other may be cut."""
    made = Rounded(bits=4, group=32).apply(small, tmp_path / "made", context(small))
    before, after = (each.load().model.layers[0].mlp.up_proj.weight.detach().reshape(-1, 32) for each in (small, made))
    step = before.abs().amax(1, keepdim=True) / 8
    levels = after / step
    assert (levels.round() - levels).abs().max() < 1e-2 and levels.abs().round().max() == 8
    error = ((after - before) / step).abs()
    assert error.max() <= 1.01 and error[before.abs() < 7 * step].max() <= 0.51
    assert len(levels[0].round().unique()) > 4


def test_advice(small):
    found = advise(str(small.folder))
    tried = {trial.label: trial for trial in found.trials}
    assert {"quantise bits=8", "quantise bits=4 group=64", "svd keep=0.9", "width mlp=0.9"} <= set(tried)
    assert 0 < tried["quantise bits=8"].loss < tried["quantise bits=4 group=64"].loss
    assert tried["depth drop=1 method=influence"].compute < 1
    assert "must be kept" in tried["vocabulary keep=0.5"].refused, "half of so few tokens is less than the bytes need"
    assert found.words[-1] == f"Try first: lightship ship {small.folder} -p int8", "a command that runs as it stands"


def test_a_cut_vocabulary_is_not_compared_by_the_tokens_that_stay(tmp_path):
    """Its KL divergence is 0: what it costs is text that is written otherwise."""
    model = tiny_llama(tmp_path / "llama", max_position_embeddings=128, vocab_size=2048)
    tiny_tokenizer(model.folder, 2048)
    found = advise(str(model.folder))
    cut = next(trial for trial in found.trials if trial.name == "vocabulary")
    assert cut.refused is None and cut.compute < 1 and cut.loss < 1e-6 and cut.losses["bits_per_byte_ratio"] > 1
    computing, vocabulary = (next(each for each in found.words if each.startswith(word))
                             for word in ("Computing", "Vocabulary"))  # fmt: skip
    assert "vocabulary" not in computing and "times the bits a byte" in vocabulary


def test_of_an_encoder_on_the_command_line(tmp_path):
    encoder = tiny_encoder(tmp_path / "bert", "BertModel")
    done = lightship("advise", encoder.folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "cosine_loss" in found["trials"][0]["losses"] and found["tables"] > 0.2
