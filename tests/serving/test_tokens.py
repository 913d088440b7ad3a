"""What each token adds to a text, byte for byte, for the tokenizers that models come with."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lightship.serving.text import TextStream
from lightship.serving.tokens import Line, Shown, TokenBytes, as_legacy
from tests.tiny import _trained

TEXT = "naïve café — 漢字かな 🚢🏴‍☠️ and\n\ttabs; ünïcödé"


def llama_like() -> Tokenizer:
    """As SentencePiece models with byte fallback are: llama 1 and 2, Mistral, Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "n", "d", "▁a", "nd", "é"]
    numbered = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(numbered, [("▁", "a"), ("n", "d")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def gemma_like() -> Tokenizer:
    """The same without a space before the first word, which is then kept where there is one."""
    tokenizer = llama_like()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer.from_str(_trained("bpe", 512))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("漢字", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "n": 2, "d": 3, "▁a": 4}, [("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


CASES = [
    (byte_level, TEXT), (byte_level, "<think> 漢字 </think><|end|>x"), (byte_level, " begins with a space"),
    (llama_like, TEXT), (llama_like, "a and  and a"), (llama_like, " and a"), (gemma_like, " and a"),
    (metaspace, "a nad a"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "text"), CASES)
def test_the_bytes_of_the_tokens_join_to_the_text(build, text):
    tokenizer = build()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    line = Line(TokenBytes(tokenizer))
    tokens = [line.add(number, -1.0) for number in ids]
    whole = tokenizer.decode(ids)
    assert len(ids) > 2 and b"".join(token.bytes for token in tokens) == whole.encode()
    for token in tokens:  # where a token begins in the text, exactly, also within a character
        before = len(b"".join(other.bytes for other in tokens[: tokens.index(token)]).decode("utf-8", "ignore"))
        assert token.offset == before


@pytest.mark.parametrize("build", [byte_level, llama_like])
@pytest.mark.parametrize("stop", [(), ("kana",), (" and",)])
def test_tokens_come_with_the_text_that_shows_them(build, stop):
    tokenizer = build()
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    stream, shown = TextStream(tokenizer, stop), Shown(TokenBytes(tokenizer))
    said, given = "", []
    for number in ids:
        new = stream.push([number])
        shown.push([number], [-1.0])
        said += new
        given += shown.take(new, cut=stream.stopped)
        raw = b"".join(token.bytes for token in given)
        assert said.encode().startswith(raw) or stream.stopped
        if stream.stopped:
            break
    else:
        rest = stream.finish()
        said += rest
        given += shown.take(rest, ended=True, cut=stream.stopped)
    raw = b"".join(token.bytes for token in given)
    assert raw.startswith(said.encode()) and len(raw) < len(said.encode()) + len(given[-1].bytes)
    assert stream.stopped == (" and" in stop)


def test_part_of_a_character_is_named_by_its_bytes():
    tokenizer = byte_level()
    about = TokenBytes(tokenizer)
    line = Line(about)
    ids = tokenizer.encode("🚢", add_special_tokens=False).ids
    legacy = as_legacy([line.add(number, -1.0) for number in ids], about)
    assert legacy["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x9a", "bytes:\\xa2"] or len(ids) < 4
    assert legacy["text_offset"] == [0] * len(ids)


def test_the_alternatives_hold_the_token_that_came_and_lose_none():
    """Two tokens may look alike: the second keeps its place under its number."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(" in", special=False)])
    about = TokenBytes(tokenizer)
    a, b, special = (tokenizer.token_to_id(piece) for piece in ("a", "b", "<|end|>"))
    token = Line(about).add(b, -3.0, ((a, -1.0), (special, -2.0)))
    assert as_legacy([token], about)["top_logprobs"] == [{"b": -3.0, "a": -1.0, "<|end|>": -2.0}]
    twins = [tokenizer.token_to_id("Ġin"), tokenizer.token_to_id(" in")]
    assert None not in twins and about.name(twins[0]) == about.name(twins[1]) == " in"
    token = Line(about).add(b, -3.0, ((twins[0], -1.0), (twins[1], -2.0)))
    assert as_legacy([token], about)["top_logprobs"] == [{"b": -3.0, " in": -1.0, f"token_id:{twins[1]}": -2.0}]
