"""The tokenizer of a GGUF file: which of llama.cpp's pre-tokenizers cuts as `tokenizer.json` does, and what it is told
of tokens."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightship.errors import UnsupportedError
from lightship.targets import _gguf_tokenizer as gguf_tokenizer
from tests.tiny import SPECIAL, _trained

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TIKTOKEN = (  # as Llama 3 and Qwen2 themselves have it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PRES = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": pre_tokenizers.Sequence([split(TIKTOKEN.replace("DIGITS", "{1,3}")), BYTES]),
    "qwen2": pre_tokenizers.Sequence([split(TIKTOKEN.replace("DIGITS", "")), BYTES]),
    "deepseek-coder": pre_tokenizers.Sequence(
        [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
         pre_tokenizers.Digits(individual_digits=True), BYTES]
    ),
}  # fmt: skip


def bpe(pre=GPT2, *, whole=False):
    """The tests' tokenizer with another pre-tokenizer."""
    tokenizer = Tokenizer.from_str(_trained("bpe", 512))
    tokenizer.model.ignore_merges = whole
    tokenizer.pre_tokenizer = pre
    return tokenizer


def metadata(tokenizer, size=600, **special):
    """What a GGUF file would say of it."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|end|>", **special})
    found = gguf_tokenizer.vocabulary_of(fast, size, (0,))
    said = {"tokens": found.tokens, "token_type": found.types, "merges": found.merges, "pre": found.pre}
    if found.scores:
        said |= {"scores": found.scores, "add_space_prefix": found.prefixed}
    said |= {f"{name}_token_id": number for name, number in found.special.items()}
    said |= {f"add_{name}_token": added for name, added in found.adds.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in said.items()}


@pytest.mark.parametrize("name", PRES)
def test_the_pre_tokenizer_is_found(name):
    tokenizer = bpe(PRES[name], whole=name == "llama-bpe")
    assert gguf_tokenizer.pre_tokenizer_of(tokenizer) == name
    gguf_tokenizer.check_ids(metadata(tokenizer), tokenizer)


def test_whole_pieces_decide():
    assert gguf_tokenizer.pre_tokenizer_of(bpe(PRES["llama-bpe"])) == "smaug-bpe"
    with pytest.raises(UnsupportedError, match="no pre-tokenizer"):
        gguf_tokenizer.pre_tokenizer_of(bpe(whole=True))


@pytest.mark.parametrize(
    "pre",
    [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Sequence([split(r"\p{N}{1,2}"), GPT2]),
     pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES]), BYTES],
)  # fmt: skip
def test_an_unknown_pre_tokenizer_is_refused(pre):
    with pytest.raises(UnsupportedError, match="known are gpt-2, smollm"):
        gguf_tokenizer.pre_tokenizer_of(bpe(pre))


def test_every_pre_tokenizer_cuts_the_probes_in_its_own_way():
    """Else the first of two would be taken for both."""
    cuts = {}
    for name, pre in gguf_tokenizer.PRE_TOKENIZERS.items():
        splitter = gguf_tokenizer._splitter(pre)
        pieces = [piece for probe in gguf_tokenizer.PROBES for piece, _ in splitter.pre_tokenize_str(probe)]
        cuts[name] = (tuple(pieces), pre.whole)
    assert len(set(cuts.values())) == len(cuts)


def test_normalisers():
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    assert "NFC" in gguf_tokenizer.vocabulary_of(fast, 600, (0,)).remarks[0]
    gguf_tokenizer.check_ids(metadata(tokenizer), tokenizer)
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedError, match="Lowercase"):
        gguf_tokenizer.pre_tokenizer_of(tokenizer)


def test_tokens_and_their_types():
    tokenizer = bpe()
    tokenizer.add_tokens(["<tool_call>", "<|fim|>"])
    known = tokenizer.get_vocab_size()
    said = metadata(tokenizer, known + 2)
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert tokens[: len(SPECIAL)] == tuple(SPECIAL) and types[: len(SPECIAL)] == (3,) * len(SPECIAL)
    assert tokens[-4:] == ("<tool_call>", "<|fim|>", f"[PAD{known}]", f"[PAD{known + 1}]")
    assert types[-4:] == (4, 3, 5, 5) and set(types[len(SPECIAL) : -4]) == {1}
    with pytest.raises(UnsupportedError, match=f"the model {known - 1} embeddings"):
        metadata(tokenizer, known - 1)


def test_begin_and_end():
    tokenizer = bpe()
    assert metadata(tokenizer)["tokenizer.ggml.bos_token_id"] == 0  # else llama.cpp takes token 11
    tokenizer.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    said = metadata(tokenizer, bos_token="<|user|>")
    assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == (True, False)
    gguf_tokenizer.check_ids(said, tokenizer)
    with pytest.raises(UnsupportedError, match="one begin and one end token"):
        metadata(tokenizer, bos_token="<|system|>")


def test_several_ends():
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe(), eos_token="<|end|>")
    found = gguf_tokenizer.vocabulary_of(fast, 600, (3, 0, 1, 2))
    assert [found.special[name] for name in ("eos", "eot", "eom")] == [0, 3, 1]
    assert "left out: 2" in found.remarks[0]


def test_other_ids_are_refused():
    """An added token that takes the space before it, which llama.cpp would not."""
    tokenizer = bpe()
    tokenizer.add_special_tokens([AddedToken("<|greedy|>", lstrip=True)])
    with pytest.raises(UnsupportedError, match=r"llama\.cpp would cut"):
        gguf_tokenizer.check_ids(metadata(tokenizer), tokenizer)


# ── SentencePiece ───────────────────────────────────────────────────────────

METASPACE = [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False) for scheme in ("always", "first", "never")]


def sentencepiece(pre=None):
    """As llama 2's own file has it, or as transformers makes it anew, without a normaliser."""
    tokenizer = Tokenizer.from_str(_trained("sentencepiece", 800))
    if pre is not None:
        tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre
    return tokenizer


def said_of(tokenizer):
    return metadata(tokenizer, 900, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("pre", [None, *METASPACE], ids=["every", "always", "first", "never"])
def test_sentencepiece_cuts_as_llama_cpp_does(pre, request):
    tokenizer = sentencepiece(pre)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    assert gguf_tokenizer.pre_tokenizer_of(tokenizer) == "default"
    said = said_of(tokenizer)
    gguf_tokenizer.check_ids(said, tokenizer)
    types = said["tokenizer.ggml.token_type"]
    assert types[:4] == (2, 3, 3, 6) and types[258:260] == (6, 1) and types[800:802] == (4, 5)
    text = "The statement is executed; naïve 漢字  🚢 twice  over"
    assert [1, *gguf_tokenizer.reader(said)(text)] == tokenizer.encode(text).ids
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    told = gguf_tokenizer.vocabulary_of(fast, 900, (2,)).remarks
    assert len(told) == {"every": 0, "always": 1, "first": 2, "never": 0}[request.node.callspec.id]


def test_without_scores_the_cuts_are_others():
    """The check of ids proves something only if this makes it fail: one score for all, as others write it."""
    tokenizer = sentencepiece()
    said = said_of(tokenizer) | {"tokenizer.ggml.scores": (-1000.0,) * 900}
    with pytest.raises(UnsupportedError, match=r"llama\.cpp would cut"):
        gguf_tokenizer.check_ids(said, tokenizer)


def test_merges_that_scores_cannot_say_are_refused():
    def changed(change):
        described = json.loads(_trained("sentencepiece", 800))
        change(described["model"])
        return Tokenizer.from_str(json.dumps(described))

    def mixed(model):  # one of two ways to a token to the end
        ways = [left + right for left, right in model["merges"]]
        model["merges"].append(model["merges"].pop(next(at for at, way in enumerate(ways) if ways.count(way) > 1)))

    def forgotten(model):
        model["merges"].pop(next(at for at, (left, right) in enumerate(model["merges"]) if len(left) + len(right) > 2))

    def lacking(model):
        model["vocab"]["<odd>"] = model["vocab"].pop("<0x41>")

    for change, reason in ((mixed, "mixed up"), (forgotten, r"llama\.cpp would join"), (lacking, "lacks 1 of the 256")):
        with pytest.raises(UnsupportedError, match=reason):
            gguf_tokenizer.pre_tokenizer_of(changed(change))
    for pre in (GPT2, pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace()):
        with pytest.raises(UnsupportedError, match="would prepare text otherwise"):
            gguf_tokenizer.pre_tokenizer_of(sentencepiece(pre))
