"""What an encoder is without its weights: its kind, bounds, pooling; and what does not fit is refused by name."""

import json
import shutil

import numpy as np
import pytest

from lightship.checkpoint import Checkpoint
from lightship.encoder import Encoder, Padded, Pooling, Row, read_pooling
from lightship.errors import ContextTooLong, RequestError, SourceError, UnsupportedError
from lightship.evaluation.encoders import check_distance, compare, distance, gate_rows, record
from lightship.evaluation.text import open_text
from lightship.find import find, names
from lightship.kind import kind_of
from tests.tiny import tiny_encoder, wordpiece


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("classifier"), "BertForSequenceClassification", num_labels=3)


@pytest.mark.parametrize(("architecture", "kind"), [
    ("LlamaForCausalLM", "decoder"), ("GPT2LMHeadModel", "decoder"), ("BertForSequenceClassification", "classifier"),
    ("RobertaForQuestionAnswering", "qa"), ("XLMRobertaModel", "embedder"), (None, "decoder"),
])  # fmt: skip
def test_kinds(architecture, kind):
    assert kind_of({"architectures": [architecture]} if architecture else {}) == kind


@pytest.mark.parametrize("config", [
    {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
    {"architectures": ["BartForSequenceClassification"], "is_encoder_decoder": True},
    {"architectures": ["BertForMaskedLM"]}, {"architectures": ["LlamaModel"]}, {"architectures": ["A", "B"]},
    {"architectures": [5]}, {"architectures": "BertModel"},
])  # fmt: skip
def test_what_is_neither_is_refused_by_name(config):
    with pytest.raises(UnsupportedError, match=r"supported are|expected exactly one"):
        kind_of(config)


def slow_pool(hidden, mask, mode):
    """One row, one token at a time."""
    rows = []
    for vectors, marks in zip(hidden, mask, strict=True):
        real = [vector for vector, mark in zip(vectors, marks, strict=True) if mark]
        if mode == "cls":
            rows.append(real[0])
        elif mode == "lasttoken":
            rows.append(real[-1])
        elif mode == "max":
            rows.append([max(column) for column in zip(*real, strict=True)])
        else:
            divisor = len(real) if mode == "mean" else len(real) ** 0.5
            rows.append([sum(column) / divisor for column in zip(*real, strict=True)])
    return np.array(rows)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len", "lasttoken"])
def test_pooling_against_one_token_at_a_time(mode):
    hidden = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    hidden[mask == 0] = 1e6  # what stands at padding must not matter
    expected = slow_pool(hidden, mask, mode)
    np.testing.assert_allclose(Pooling(mode).apply(hidden, mask), expected, rtol=1e-5)
    scaled = Pooling(mode, normalise=True).apply(hidden, mask)
    np.testing.assert_allclose(scaled, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5)


def sentence_files(folder, pooling, *more):
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *more]
    (folder / "modules.json").write_text(json.dumps(
        [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (kind, path) in
         enumerate(modules)]))  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_pooling_is_the_models_own(tmp_path):
    assert read_pooling(tmp_path) == Pooling("mean", False, stated=False)
    config = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    sentence_files(tmp_path, config, ("Normalize", "2_Normalize"))
    assert read_pooling(tmp_path) == Pooling("cls", True, stated=True)


@pytest.mark.parametrize(("pooling", "more"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ()),
    ({"pooling_mode_weightedmean_tokens": True}, ()),
    ({"pooling_mode_mean_tokens": True}, (("Dense", "2_Dense"),)),
])  # fmt: skip
def test_what_would_change_the_embedding_is_refused(tmp_path, pooling, more):
    sentence_files(tmp_path, pooling, *more)
    with pytest.raises(UnsupportedError, match=r"pools by|has a module"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("place", ["../elsewhere", "/etc", "a/b"])
def test_modules_stay_in_their_folder(tmp_path, place):
    (tmp_path / "modules.json").write_text(json.dumps([{"path": place, "type": "x.Pooling"}]))
    with pytest.raises(SourceError, match="outside its folder"):
        read_pooling(tmp_path)


def test_inputs_are_bounded_and_never_cut(classifier):
    encoder = Encoder.load(classifier.folder)
    assert encoder.encode("").ids == [2, 3]  # [CLS] [SEP]; the file's own padding to 64 is switched off
    assert len(encoder.encode("a " * 100).ids) > 64  # and so is its truncation
    with pytest.raises(ContextTooLong, match="maximum context length is 160 tokens"):
        encoder.encode("a " * 500)
    for ids, message in (([], "no tokens"), ([-1], "lie in"), ([10**6], "lie in"), ([1] * 161, "160 tokens")):
        with pytest.raises(RequestError, match=message):
            encoder.check(ids)


def test_the_context_counts_what_roberta_keeps_for_padding(tmp_path):
    tiny_encoder(tmp_path, "RobertaModel", max_position_embeddings=66)
    assert Encoder.load(tmp_path).context == 64
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    assert Encoder.load(tmp_path).context == 32


def changed(checkpoint, folder, **changes):
    copy = Checkpoint(shutil.copytree(checkpoint.folder, folder))
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, **changes}))
    return copy


def test_more_labels_than_rows(classifier, tmp_path):
    names = {str(index): f"label {index}" for index in range(5)}
    more = changed(classifier, tmp_path / "more", id2label=names, label2id={})
    with pytest.raises(SourceError, match="classifier"):
        more.load()
    odd = changed(classifier, tmp_path / "odd", id2label={"0": "a", "7": "b"})
    with pytest.raises(SourceError, match="id2label must name"):
        Encoder.load(odd.folder)
    one = changed(classifier, tmp_path / "one", id2label={"0": "score"})
    with pytest.raises(UnsupportedError, match="one label"):
        Encoder.load(one.folder)


def test_vocabularies_that_do_not_fit(classifier, tmp_path):
    for size in (300, 500):
        other = changed(classifier, tmp_path / str(size), vocab_size=size)
        with pytest.raises(SourceError, match="word_embeddings"):
            other.load()
    wordpiece(tmp_path / "300", size=600)
    larger = changed(classifier, tmp_path / "larger")
    shutil.copyfile(tmp_path / "300" / "tokenizer.json", larger.folder / "tokenizer.json")
    with pytest.raises(SourceError, match="the tokenizer has 600 tokens, the model"):
        Encoder.load(larger.folder)


def test_a_pooler_is_not_needed_to_embed(tmp_path):
    from safetensors.numpy import load_file, save_file

    checkpoint = tiny_encoder(tmp_path, "BertModel")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint.load()
    kept.pop("encoder.layer.0.output.dense.weight")
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"missing keys: encoder\.layer\.0"):
        checkpoint.load()


def slow_kld(p, q):
    return sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def test_the_distance_against_one_row_at_a_time(classifier):
    encoder = Encoder.load(classifier.folder)
    random = np.random.default_rng(1)
    logits, other = random.normal(size=(2, 4, 3)).astype(np.float32)
    mask = np.ones((4, 2), np.int64)
    p, q = encoder.meaning(logits, mask), encoder.meaning(other, mask)
    far, same = compare(encoder, p, q)
    np.testing.assert_allclose(far, [slow_kld(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-4)
    assert same.tolist() == (logits.argmax(1) == other.argmax(1)).tolist()
    q[1] = np.nan
    assert compare(encoder, p, q)[0][1] == np.inf


@pytest.mark.parametrize("spoilt", [[np.inf, 0], [-np.inf, -np.inf], [np.inf, np.inf], [np.inf, -np.inf], [np.nan, 0]])
@pytest.mark.parametrize("changes", [
    {"architecture": "BertForSequenceClassification"}, {"architecture": "BertForQuestionAnswering"},
    {"architecture": "BertForSequenceClassification", "problem_type": "multi_label_classification"},
    {"architecture": "BertModel"},
], ids=["labels", "qa", "several", "embedder"])  # fmt: skip
def test_what_overflows_is_infinitely_far_and_no_warning(tmp_path, changes, spoilt):
    encoder = Encoder.load(tiny_encoder(tmp_path / "bert", **changes).folder)
    outputs = np.random.default_rng(1).normal(size=(3, 2) if encoder.kind == "classifier" else (3, 4, 2))
    mask, right = np.ones((3, 4), np.int64), outputs.astype(np.float32)
    wrong = right.copy()
    wrong[1] = spoilt
    far, same = compare(encoder, encoder.meaning(right, mask), encoder.meaning(wrong, mask))
    np.testing.assert_allclose(far[[0, 2]], 0, atol=1e-6)
    assert far[1] == np.inf and same.tolist() == [True, False, True]


class Deaf:
    """The original that hears no mask: padding is read as text."""

    def __init__(self, engine):
        self._engine = engine

    def run(self, ids, mask, types):
        return self._engine.run(ids, np.ones_like(mask), types)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification", "BertForQuestionAnswering"])
def test_a_dropped_mask_is_caught(tmp_path, architecture):
    """The control of the gate: with the mask it is exact, without it far above every limit."""
    from lightship.errors import LimitExceeded

    checkpoint = tiny_encoder(tmp_path / "m", architecture)
    encoder = Encoder.load(checkpoint.folder)
    engine = find("targets", "pytorch").open_encoder(checkpoint.folder)
    rows = gate_rows(encoder, open_text(None, None))
    assert max(map(len, rows.rows)) == encoder.context and min(map(len, rows.rows)) == 1
    record(encoder, engine, rows, tmp_path / "said")
    check_distance(distance(encoder, engine, rows, tmp_path / "said"), 1e-6, "gate")
    with pytest.raises(LimitExceeded, match=r"exceeds the limit 0\.01"):
        check_distance(distance(encoder, Deaf(engine), rows, tmp_path / "said"), 0.01, "gate")


def test_rows_are_padded_with_the_models_own_id(tmp_path):
    tiny_encoder(tmp_path, "RobertaModel")
    padded = Encoder.load(tmp_path).pad_rows([Row((5, 6), (0, 0)), Row((7,), (0,))])
    assert isinstance(padded, Padded)
    assert padded.ids.tolist() == [[5, 6], [7, 1]] and padded.mask.tolist() == [[1, 1], [1, 0]]


def test_companions_are_no_targets():
    assert names("targets") == ["fake", "gguf", "onnx", "openvino", "pytorch"]
