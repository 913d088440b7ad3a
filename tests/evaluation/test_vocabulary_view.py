"""The original through a cut vocabulary: same rows, so the same distribution over the kept tokens."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.checkpoint import Checkpoint, save
from lightship.errors import SourceError
from lightship.evaluation import divergence, parity
from lightship.evaluation.vocabulary_view import Restricted, RestrictedEngine, RestrictedPair
from lightship.find import find
from lightship.kept import Kept
from lightship.seq2seq import Seq2Seq
from tests.tiny import tiny_encoder, tiny_seq2seq

TABLES = ("embed_tokens.weight", "shared.weight", "lm_head.weight", "word_embeddings.weight", "predictions.bias")


def cut_by_hand(checkpoint, folder, kept):
    """The rows `kept` of every table with the vocabulary; the tokenizer is left as it is."""
    shutil.copytree(checkpoint.folder, folder)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(TABLES):
            state[name] = tensor[torch.from_numpy(kept)].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(kept)}))
    written = Kept(checkpoint.vocabulary, kept).written()
    (folder / "vocabulary.json").write_text(json.dumps(written))
    return Checkpoint(folder)


def even(checkpoint):
    return np.arange(0, checkpoint.vocabulary, 2)


def scorer(checkpoint):
    return find("targets", "pytorch").open_scorer(checkpoint.folder)


def test_a_cut_decoder_is_the_original_over_the_kept_tokens(llama, tmp_path):
    cut = cut_by_hand(llama, tmp_path / "cut", even(llama))
    original = Restricted(scorer(llama), cut.kept_tokens)
    tokens = np.random.default_rng(0).integers(0, cut.vocabulary, 200).tolist()
    batches = parity.gate_batches(tokens, cut.context_length, original.greedy)
    reference = parity.record(original, batches, tmp_path / "reference")
    assert reference.rounding is not None
    found = divergence.compare(reference, scorer(cut))
    assert found.kld.mean() < 1e-6 and found.top1.all()
    greedy = batches[-1].ids[:, 16:]
    assert scorer(cut).greedy(batches[-1].ids[:, :16].tolist(), greedy.shape[1]) == greedy.tolist()


def test_ids_are_not_taken_for_the_originals(llama, tmp_path):
    """Without the map the original reads other words."""
    cut = cut_by_hand(llama, tmp_path / "cut", even(llama))
    batch = divergence.Batch.of("rows", [[5, 9, 30, 2, 7]])
    shifted = Restricted(scorer(llama), np.arange(cut.vocabulary))
    reference = divergence.record(shifted, [batch], tmp_path / "reference")
    assert divergence.compare(reference, scorer(cut)).kld.mean() > 0.1


def test_a_cut_encoder_decoder(tmp_path):
    t5 = tiny_seq2seq(tmp_path / "t5", "t5")
    kept = np.array([0, 1, 2, 3, *range(5, t5.vocabulary, 2)])
    cut = cut_by_hand(t5, tmp_path / "cut", kept)
    about = Seq2Seq.load(t5.folder)  # the special ids are the first, which are kept
    original = RestrictedPair(scorer(t5), kept, about)
    source, mask = about.padded([[5, 6, 7, 40, 0], [9, 0]])
    written = original.greedy([[5, 6, 7, 40, 0], [9, 0]], 6)
    rows = np.array([[2, *row] for row in written])
    batch = divergence.Batch("rows", rows, np.ones_like(rows), np.ones_like(rows, dtype=bool), source, mask)
    reference = divergence.record(original, [batch], tmp_path / "reference")
    target = find("targets", "pytorch")
    found = divergence.compare(reference, target.Seq2SeqScorer(target.TorchPair(cut, "float32")))
    assert found.kld.max() < 1e-6 and found.top1.all()


def test_a_cut_encoder(tmp_path):
    bert = tiny_encoder(tmp_path / "bert", "BertForSequenceClassification")
    cut = cut_by_hand(bert, tmp_path / "cut", even(bert))
    target = find("targets", "pytorch")
    ids = np.array([[1, 8, 100, 4], [1, 9, 0, 0]])
    given = ids, np.array([[1, 1, 1, 1], [1, 1, 0, 0]]), np.zeros_like(ids)
    engine = RestrictedEngine(target.open_encoder(bert.folder), cut.kept_tokens)
    np.testing.assert_allclose(engine.run(*given), target.open_encoder(cut.folder).run(*given), atol=1e-5)
    engine.close()


def test_later_steps_carry_the_record(llama, tmp_path):
    cut = cut_by_hand(llama, tmp_path / "cut", even(llama))
    saved = save(cut.load(), cut.folder, tmp_path / "saved", {"step": "again"})
    assert saved.kept_tokens.tolist() == even(llama).tolist()
    assert llama.kept_tokens is None


@pytest.mark.parametrize(("change", "said"), [
    ({"version": 2}, "of version 2, expected 1"),
    ({"kept": "0, 1"}, "needs the size"),
    ({"kept": [True, 2]}, "needs the size"),
    ({"original": None}, "needs the size"),
    ({"kept": [0, 2, 1]}, "must ascend"),
    ({"kept": [-1, 2]}, "must ascend"),
    ({"kept": [0, 512]}, "less than 512"),
    ({"kept": [0, 2]}, "keeps 2 tokens, config.json has a vocab_size of 256"),
])  # fmt: skip
def test_a_record_that_cannot_be_right(llama, tmp_path, change, said):
    cut = cut_by_hand(llama, tmp_path / "cut", even(llama))
    path = cut.folder / "vocabulary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError, match=said):
        _ = cut.kept_tokens


def test_two_cuts_are_one():
    once = Kept(100, np.arange(0, 100, 2))
    assert once.cut(np.array([0, 3, 10])).ids.tolist() == [0, 6, 20]
