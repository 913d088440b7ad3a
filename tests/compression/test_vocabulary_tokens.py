"""A cut tokenizer: what it keeps reads as before, whatever else is written still reads."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from lightship.calibration import default_text
from lightship.compression._bpe import BPE
from lightship.compression._tokenizer_files import TokenizerFiles
from lightship.errors import UnsupportedError, UsageError
from lightship.step import Context, make_step
from lightship.tokenizer import load_tokenizer
from tests.compression.tokenizers_of import KINDS, checkpoint_with

CORPUS = "".join(topics[name] for name in ("lambda", "assert", "async", "in", "integers", "break"))
WORDS = sorted(set("".join(topics.values()).split(" ")))[::40]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(checkpoint, the same cut to `CORPUS`) with a tokenizer of one kind."""
    folder = tmp_path_factory.mktemp("vocabulary")
    checkpoint = checkpoint_with(folder / "whole", request.param)
    (folder / "corpus.txt").write_text(CORPUS)
    step = make_step("vocabulary", {"corpus": str(folder / "corpus.txt")})
    return checkpoint, step.apply(checkpoint, folder / "cut", Context((), default_text()))


def ids_of(checkpoint, text):
    return load_tokenizer(checkpoint.folder).encode(text, add_special_tokens=False).ids


def test_the_corpus_reads_token_for_token(pair):
    whole, cut = pair
    size = load_tokenizer(whole.folder).get_vocab_size()
    assert cut.vocabulary < 0.9 * size  # something was dropped, so the equality means something
    assert cut.kept_tokens[ids_of(cut, CORPUS)].tolist() == ids_of(whole, CORPUS)


def both(pair):
    whole, cut = pair
    return load_tokenizer(whole.folder), load_tokenizer(cut.folder), cut.kept_tokens


TEXTS = some.text() | some.lists(some.sampled_from(WORDS)).map(" ".join) | some.text("aehilnorst ▁é漢\n\t 01.")


def test_any_text_reads_and_is_written_as_before(pair):
    old, new, kept = both(pair)

    @settings(max_examples=300, deadline=None)
    @example("naïve façade — 漢字 🚢\x00\r\n")
    @given(TEXTS)
    def holds(text):
        before, after = (each.encode(text, add_special_tokens=False).ids for each in (old, new))
        assert new.decode(after) == old.decode(before)
        if set(before) <= set(kept.tolist()):
            assert kept[after].tolist() == before

    holds()


def test_text_of_other_tokens_is_longer_not_lost(pair):
    """The property above says little unless tokens were dropped that this text has."""
    old, new, kept = both(pair)
    text = topics["bltin-types" if "bltin-types" in topics else "types"][:3000]
    before, after = (each.encode(text, add_special_tokens=False).ids for each in (old, new))
    assert set(before) - set(kept.tolist()) and len(after) > len(before)
    assert new.decode(after) == old.decode(before)


def test_special_tokens_stay_what_they_are(pair):
    old, new, kept = both(pair)
    before, after = (each.get_added_tokens_decoder() for each in (old, new))
    assert {int(kept[token]): str(each) for token, each in after.items()} == {
        token: str(each) for token, each in before.items()
    }
    text = "<|user|>lambda<|end|>"
    assert kept[new.encode(text).ids].tolist() == old.encode(text).ids


def test_a_token_is_kept_with_those_it_is_merged_from():
    """`abcd` comes about as ab + cd, since cd comes before bc; abc and bc are never needed, though they are known."""
    names = ["a", "b", "c", "d", "ab", "cd", "bc", "abc", "abcd"]
    merges = [["c", "d"], ["a", "b"], ["b", "c"], ["ab", "c"], ["ab", "cd"], ["abc", "d"]]
    bpe = BPE.of({"type": "BPE", "vocab": {name: token for token, name in enumerate(names)}, "merges": merges})
    assert {names[token] for token in bpe.parts(8)} == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    new = {token: row for row, token in enumerate(sorted(bpe.parts(8)))}
    cut = bpe.cut(new)
    assert cut["merges"] == [["c", "d"], ["a", "b"], ["ab", "cd"]]
    assert cut["vocab"] == {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "abcd": 6}
    assert BPE.of({"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}).parts(2) == {0, 1, 2}, (
        "as older files say it"
    )


def test_merges_on_other_parts_are_refused():
    with pytest.raises(UnsupportedError, match="end_of_word_suffix"):
        BPE.of({"vocab": {}, "merges": [], "end_of_word_suffix": "</w>"})


def test_without_bytes_to_spell_it_every_character_stays(tmp_path):
    files = TokenizerFiles.of(checkpoint_with(tmp_path / "model", "unigram"))
    characters = {token for token, (text, _) in enumerate(files.whole["model"]["vocab"]) if len(text) == 1}
    assert characters <= files.required()
    lowest = min(range(len(files.whole["model"]["vocab"])), key=lambda token: files.whole["model"]["vocab"][token][1])
    assert lowest in files.required(), "unknown characters are weighed by it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoint_with(tmp_path_factory.mktemp("sizes") / "whole", "bpe")


class TestHowManyAreKept:
    def cut(self, whole, folder, **options):
        return make_step("vocabulary", options).apply(whole, folder, Context((), default_text().split()[0]))

    def test_a_number(self, whole, tmp_path):
        assert self.cut(whole, tmp_path / "cut", keep="600").vocabulary == 600

    def test_a_share(self, whole, tmp_path):
        assert self.cut(whole, tmp_path / "cut", keep="0.5").vocabulary == whole.vocabulary // 2

    def test_a_multiple_is_reached_by_further_tokens(self, whole, tmp_path):
        cut = self.cut(whole, tmp_path / "cut", keep=600, multiple=64)
        assert cut.vocabulary == 640 == load_tokenizer(cut.folder).get_vocab_size()

    def test_the_frequent_first(self, whole, tmp_path):
        """Of those that could go, each kept one is as frequent as the most frequent one that went, or a part."""
        cut = self.cut(whole, tmp_path / "cut", keep=500)
        files, kept = TokenizerFiles.of(whole), set(cut.kept_tokens.tolist())
        counts = np.zeros(whole.vocabulary, int)
        for document in default_text().split()[0].documents:
            np.add.at(counts, files.encode(document.text), 1)
        parts = {part for token in kept for part in files.pieces.parts(token) - {token}}
        chosen = [counts[token] for token in kept - files.required() - parts]
        gone = [token for token in files.pieces.tokens() if token not in kept]
        fitting = [counts[token] for token in gone if len(files.pieces.parts(token) - kept) == 1]
        assert min(chosen) >= max(fitting)

    def test_rare_ones_count_as_not_found(self, whole, tmp_path):
        every, often = (self.cut(whole, tmp_path / str(least), minimum=least) for least in (1, 20))
        assert often.vocabulary < every.vocabulary and often.lineage[-1]["found"] < every.lineage[-1]["found"]

    def test_too_few_says_how_many(self, whole, tmp_path):
        with pytest.raises(UsageError, match="that is 100 of") as error:
            self.cut(whole, tmp_path / "cut", keep=100)
        least = int(error.value.message.split(";")[1].split()[0])
        assert self.cut(whole, tmp_path / "cut", keep=least).vocabulary == least

    @pytest.mark.parametrize(("options", "said"), [
        ({"keep": 1000.5}, "a share up to 1 or a whole number"), ({"keep": "0"}, "greater than 0"),
        ({"multiple": 0}, "greater than or equal to 1"), ({"corpus": "/no/such/file"}, "cannot be read"),
    ])  # fmt: skip
    def test_options_that_cannot_be(self, whole, tmp_path, options, said):
        with pytest.raises(UsageError, match=said):
            self.cut(whole, tmp_path / "cut", **options)

    def test_a_corpus_that_is_no_text(self, whole, tmp_path):
        (tmp_path / "corpus").write_bytes(b"caf\xe9")
        with pytest.raises(UsageError, match=r"not UTF-8 text: .* at byte 3"):
            self.cut(whole, tmp_path / "cut", corpus=str(tmp_path / "corpus"))

    def test_a_chat_is_read_through_the_template(self, whole, tmp_path):
        path = tmp_path / "chat.jsonl"
        messages = [{"role": "user", "content": "lambda"}, {"role": "assistant", "content": "expression"}]
        path.write_text(json.dumps({"messages": messages}) + "\n")
        cut = self.cut(whole, tmp_path / "cut", corpus=str(path))
        text = "<|user|>lambda<|end|><|assistant|>expression<|end|>"
        assert cut.kept_tokens[ids_of(cut, text)].tolist() == ids_of(whole, text)
        assert len(ids_of(cut, "statement")) > len(ids_of(whole, "statement"))
