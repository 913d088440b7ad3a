"""A model with fewer tokens: it computes what it did, its files agree, it is exported as any other."""

import json
import shutil
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint, safetensors_header, save
from lightship.compression import _tables
from lightship.compression._named_ids import mapped, named
from lightship.compression._tokenizer_files import _processor
from lightship.decoder_pipeline import EXACT
from lightship.encoder import Encoder
from lightship.errors import LightshipError, UnsupportedError
from lightship.evaluation import divergence
from lightship.evaluation.vocabulary_view import Restricted, RestrictedEngine, RestrictedPair
from lightship.find import find
from lightship.seq2seq import Seq2Seq
from lightship.step import Context, make_step
from lightship.template import load_template
from lightship.tokenizer import load_tokenizer
from tests.compression.test_steps import gemma3
from tests.tiny import tiny_encoder, tiny_gpt2, tiny_llama, tiny_seq2seq

CORPUS = "".join(topics[name] for name in ("lambda", "assert", "async", "in", "integers", "break"))
UNTIED = {"tie_word_embeddings": False}
DECODERS = {
    "llama": tiny_llama,
    "llama, a head of its own": lambda folder: tiny_llama(folder, **UNTIED),
    "gpt2": tiny_gpt2,
    "gemma3": gemma3,
}
PAIRS = {
    "t5": {}, "mt5": {"is_gated_act": True, "feed_forward_proj": "gated-gelu", **UNTIED}, "bart": {}, "marian": {},
    "m2m_100": {}, "pegasus": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS)
    return path


def cut(checkpoint, folder, corpus, **options):
    step = make_step("vocabulary", {"corpus": str(corpus), **options})
    step.refuse(checkpoint.config)
    made = step.apply(checkpoint, folder, Context((), default_text().split()[0]))
    assert made.vocabulary < checkpoint.vocabulary and made.dtype == checkpoint.dtype
    return made


def scorer(checkpoint):
    return find("targets", "pytorch").open_scorer(checkpoint.folder)


def kld(original, candidate, batch, folder):
    return divergence.compare(divergence.record(original, [batch], folder), candidate).kld.max()


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_computes_what_it_did(tmp_path, corpus, kind):
    whole = DECODERS[kind](tmp_path / "whole")
    made = cut(whole, tmp_path / "cut", corpus)
    ids = load_tokenizer(made.folder).encode(CORPUS).ids[:100]
    batch = divergence.Batch.of("rows", [ids, ids[:7]])
    assert kld(Restricted(scorer(whole), made.kept_tokens), scorer(made), batch, tmp_path / "reference") <= 1e-6


@pytest.mark.parametrize("kind", PAIRS)
def test_an_encoder_decoder_computes_what_it_did(tmp_path, corpus, kind):
    whole = tiny_seq2seq(tmp_path / "whole", kind, **PAIRS[kind])
    model = whole.load()
    if getattr(model, "final_logits_bias", None) is not None:  # it starts at 0, which any rows would match
        model.final_logits_bias += torch.linspace(-1, 1, whole.vocabulary)
        whole = save(model, whole.folder, tmp_path / "biased", {"step": "test"})
    made = cut(whole, tmp_path / "cut", corpus)
    about = Seq2Seq.load(made.folder)
    rows = [about.frame(about.tokenizer.encode(text, add_special_tokens=False).ids[:20]) for text in (CORPUS, "if")]
    source, mask = about.padded(rows)
    written, real = about.padded([[*about.start, *row] for row in rows])
    batch = divergence.Batch("rows", written, real, real == 1, source, mask)
    original = RestrictedPair(scorer(whole), made.kept_tokens, about)
    assert kld(original, scorer(made), batch, tmp_path / "reference") <= 1e-6
    greedy = original.greedy(rows[:1], 5)
    assert scorer(made).greedy(rows[:1], 5) == greedy


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "RobertaModel"])
def test_an_encoder_computes_what_it_did(tmp_path, corpus, architecture):
    whole = tiny_encoder(tmp_path / "whole", architecture)
    made = cut(whole, tmp_path / "cut", corpus)
    about, before = Encoder.load(made.folder), Encoder.load(whole.folder)
    texts = [("The lambda expression", None), ("break", "and continue")]
    read = [about.encode(*each) for each in texts]
    assert [made.kept_tokens[each.ids].tolist() for each in read] == [before.encode(*each).ids for each in texts]
    length = max(len(each.ids) for each in read)
    ids = np.array([each.ids + [about.pad] * (length - len(each.ids)) for each in read])
    mask = (np.arange(length) < np.array([[len(each.ids)] for each in read])).astype(np.int64)
    given = ids, mask, np.zeros_like(ids)
    target = find("targets", "pytorch")
    original = RestrictedEngine(target.open_encoder(whole.folder), made.kept_tokens)
    found, expected = (_real(each.run(*given), mask) for each in (target.open_encoder(made.folder), original))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _real(found, mask):
    """Without the padding, of outputs that have a length."""
    return found[mask == 1] if found.ndim == 3 and found.shape[1] == mask.shape[1] else found


def test_one_table_stays_one(tmp_path, corpus):
    for name, tied in (("tied", True), ("own", False)):
        whole = tiny_llama(tmp_path / name, tie_word_embeddings=tied)
        made = cut(whole, tmp_path / f"{name}-cut", corpus)
        tables = [entry for entry in safetensors_header(made.weight_files[0]).values() if len(entry["shape"]) == 2
                  and entry["shape"][0] == made.vocabulary]  # fmt: skip
        assert len(tables) == (1 if tied else 2)
        dropped = whole.vocabulary - made.vocabulary
        saved = sum(int(np.prod(entry["shape"])) for entry in safetensors_header(whole.weight_files[0]).values())
        left = sum(int(np.prod(entry["shape"])) for entry in safetensors_header(made.weight_files[0]).values())
        assert saved - left == dropped * 64 * len(tables)


def test_bfloat16_rows_are_the_same_bits(tmp_path, corpus):
    model = tiny_llama(tmp_path / "wide").load().to(torch.bfloat16)
    whole = save(model, tmp_path / "wide", tmp_path / "whole", {"step": "test"})
    made = cut(whole, tmp_path / "cut", corpus)
    rows = made.load().get_input_embeddings().weight
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, model.get_input_embeddings().weight[torch.from_numpy(made.kept_tokens)])


def test_every_id_is_the_new_one(tmp_path, corpus):
    """Special ids that are not the first: they move."""
    whole = tiny_llama(tmp_path / "whole")
    folder, last = whole.folder, whole.vocabulary - 1
    gone = max(set(range(last)) - set(cut(whole, tmp_path / "before", corpus).kept_tokens.tolist()))
    word = load_tokenizer(folder).id_to_token(last)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": last, "pad_token_id": last}))
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [0, last], "pad_token_id": last, "suppress_tokens": [last, gone],
         "bad_words_ids": [[gone], [last, 0]]}))  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": last, "pad_type_id": 0, "pad_token": word}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": 2}))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    made = cut(whole, tmp_path / "cut", corpus)
    new = made.vocabulary - 1
    assert made.kept_tokens[new] == last and gone not in made.kept_tokens
    assert (made.config["bos_token_id"], made.config["pad_token_id"], made.config["vocab_size"]) == (new, new, new + 1)
    generation = json.loads((made.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, new] and generation["pad_token_id"] == new
    assert generation["suppress_tokens"] == [new] and generation["bad_words_ids"] == [[new, 0]]
    assert json.loads((made.folder / "tokenizer.json").read_text())["padding"]["pad_id"] == new
    assert json.loads((made.folder / "added_tokens.json").read_text()) == {"<|user|>": 2}
    assert not (made.folder / "vocab.json").exists() and not (made.folder / "merges.txt").exists()


def test_ids_in_configurations():
    config = {
        "eos_token_id": [5, 9], "pad_token_id": -1, "image_token_index": 7, "nested": {"forced_bos_token_id": 3},
        "forced_decoder_ids": [[1, 8]], "suppress_tokens": [4], "bad_words_ids": [[4]], "unk_token_id": None,
        "sequence_bias": [[[5, 4], 1.5], [[5, 9], 2.0]], "vocab_size": 10, "id2label": {0: "no"},
    }  # fmt: skip
    assert named(config, 10) == {3, 5, 7, 8, 9}
    assert mapped(config, {3: 0, 5: 1, 7: 2, 8: 3, 9: 4}) == {
        "eos_token_id": [1, 4], "pad_token_id": -1, "image_token_index": 2, "nested": {"forced_bos_token_id": 0},
        "forced_decoder_ids": [[1, 3]], "suppress_tokens": [], "bad_words_ids": [], "unk_token_id": None,
        "sequence_bias": [[[1, 4], 2.0]], "vocab_size": 10, "id2label": {0: "no"},
    }  # fmt: skip


def test_ids_in_post_processors():
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True}
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0, 2]}}}
    found = _processor({"type": "Sequence", "processors": [roberta, template, {"type": "ByteLevel"}]}, {0: 5, 2: 6}.get)
    assert found["processors"][0]["sep"] == ["</s>", 6] and found["processors"][0]["cls"] == ["<s>", 5]
    assert found["processors"][1]["special_tokens"]["<s>"]["ids"] == [5, 6]
    with pytest.raises(UnsupportedError, match="post-processor is Sieve"):
        _processor({"type": "Sieve"}, {}.get)


def test_the_chat_template_reads_as_before(tmp_path, corpus):
    whole = tiny_llama(tmp_path / "whole")
    path = whole.folder / "chat_template.jinja"
    path.write_text("{% if true %}Quoth {{ 'the raven' }}: {% endif %}" + path.read_text())
    made = cut(whole, tmp_path / "cut", corpus)
    messages = [{"role": role, "content": "lambda"} for role in ("system", "user", "assistant")]
    text = load_template(made.folder).render(messages)
    assert text.startswith("Quoth the raven: <|system|>lambda")
    before, after = (load_tokenizer(each.folder).encode(text).ids for each in (whole, made))
    assert made.kept_tokens[after].tolist() == before


def test_two_cuts_name_the_first_original(tmp_path, corpus):
    whole = tiny_llama(tmp_path / "whole")
    once = cut(whole, tmp_path / "once", corpus)
    (tmp_path / "less.txt").write_text(CORPUS[:300])
    twice = cut(once, tmp_path / "twice", tmp_path / "less.txt")
    assert twice.kept.original == whole.vocabulary
    before = load_tokenizer(whole.folder).encode(CORPUS[:300]).ids
    assert twice.kept_tokens[load_tokenizer(twice.folder).encode(CORPUS[:300]).ids].tolist() == before
    batch = divergence.Batch.of("rows", [load_tokenizer(twice.folder).encode(CORPUS[:300]).ids])
    assert kld(Restricted(scorer(whole), twice.kept_tokens), scorer(twice), batch, tmp_path / "reference") <= 1e-6


def test_a_model_that_uses_ids_in_another_way_is_refused(tmp_path, corpus, monkeypatch):
    """The cut is checked on the model itself: here rows are taken that are not those of the tokens."""
    real = _tables._cut
    monkeypatch.setattr(_tables, "_cut", lambda model, ids, new: real(model, ids.flip(0), new))
    with pytest.raises(UnsupportedError, match="computes something else"):
        cut(tiny_llama(tmp_path / "whole"), tmp_path / "cut", corpus)


def test_a_tokenizer_that_reads_otherwise_is_refused(tmp_path, corpus, monkeypatch):
    from lightship.compression._bpe import BPE

    real = BPE.cut
    monkeypatch.setattr(BPE, "cut", lambda self, new: {**real(self, new), "merges": real(self, new)["merges"][1:]})
    with pytest.raises(LightshipError, match="in another way after the cut"):
        cut(tiny_llama(tmp_path / "whole"), tmp_path / "cut", corpus)


def test_two_vocabularies_are_refused():
    step = make_step("vocabulary", {})
    for config in ({"share_encoder_decoder_embeddings": False}, {"vocab_size": 10, "decoder_vocab_size": 12}):
        with pytest.raises(UnsupportedError, match="one vocabulary to read and another to write"):
            step.refuse(config)


@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_a_cut_checkpoint_is_exported(tmp_path, corpus, target):
    """OpenVINO's own tokenizer is compared with tokenizer.json while it is exported."""
    whole = tiny_llama(tmp_path / "whole")
    made = cut(whole, tmp_path / "cut", corpus)
    module = find("targets", target)
    module.export(made, tmp_path / "runtime", "float32")
    batch = divergence.Batch.of("rows", [load_tokenizer(made.folder).encode(CORPUS).ids[:60]])
    found = kld(Restricted(scorer(whole), made.kept_tokens), module.open_scorer(tmp_path / "runtime", EXACT), batch,
                tmp_path / "reference")  # fmt: skip
    assert found < 1e-5
    assert load_tokenizer(tmp_path / "runtime").to_str() == load_tokenizer(made.folder).to_str()


def test_the_same_input_gives_the_same_bytes(tmp_path, corpus):
    whole = tiny_llama(tmp_path / "whole")
    shutil.copytree(whole.folder, tmp_path / "copy")
    made = [cut(each, tmp_path / name, corpus) for name, each in (("a", whole), ("b", Checkpoint(tmp_path / "copy")))]
    assert made[0].digest() == made[1].digest()
