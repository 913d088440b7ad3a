"""Text while it arrives: whole characters only, stop strings across tokens."""

import random

import pytest
from tokenizers import Tokenizer

from lightship.serving.text import TextStream

TEXT = "naïve café — 漢字かな 🚢🏴‍☠️ and <|end|>\n\ttabs; ünïcödé"


@pytest.fixture(scope="module")
def tokenizer(llama):
    return Tokenizer.from_file(str(llama.folder / "tokenizer.json"))


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_whole(tokenizer, seed):
    ids = tokenizer.encode(TEXT).ids
    stream, said, chance = TextStream(tokenizer), [], random.Random(seed)
    while ids:
        step = chance.randint(1, 4)
        said.append(stream.push(ids[:step]))
        ids = ids[step:]
    said.append(stream.finish())
    assert "".join(said) == tokenizer.decode(tokenizer.encode(TEXT).ids)
    assert not any("\ufffd" in piece for piece in said)


def test_a_character_cut_off_at_the_end_is_shown_as_broken(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("🚢").ids
    assert stream.push(ids[:1]) == ""
    assert "\ufffd" in stream.finish()


@pytest.mark.parametrize("stop", ["kana", "na ka", "a kana b", "b"])
def test_stop_strings_span_tokens_and_are_left_out(tokenizer, stop):
    whole = "xx kana kana b yy"
    stream, said = TextStream(tokenizer, [stop]), ""
    for token in tokenizer.encode(whole).ids:
        said += stream.push([token])
        if stream.stopped:
            break
    assert stream.stopped
    assert said + stream.finish() == whole[: whole.index(stop)]


def test_what_only_began_like_a_stop_string_is_given_back(tokenizer):
    stream = TextStream(tokenizer, ["kanal"])
    said = "".join(stream.push([token]) for token in tokenizer.encode("xx kana").ids)
    assert said + stream.finish() == "xx kana" and not stream.stopped
