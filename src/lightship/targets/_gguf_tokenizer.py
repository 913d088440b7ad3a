"""A BPE tokenizer as llama.cpp reads it: tokens, types, merges or scores, and the id of its pre-tokenizer.

A GGUF file holds no pre-tokenizer, only the name of one that llama.cpp has built in (`tokenizer.ggml.pre`). Here it is
found by what it does: the one that cuts difficult text exactly as `tokenizer.json` does.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightship.errors import UnsupportedError
from lightship.targets import _gguf_spm

# As llama.cpp applies them, one after the other, to what the ones before left whole (src/llama-vocab.cpp).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TIKTOKEN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _TIKTOKEN.replace("DIGITS", r"\p{N}{1,3}"), _TIKTOKEN.replace("DIGITS", r"\p{N}")


@dataclass(frozen=True)
class _Pre:
    """A pre-tokenizer of llama.cpp; `whole`: a piece that is a token stays one, whatever the merges make of it."""

    cuts: tuple[str, ...]
    whole: bool = False


PRE_TOKENIZERS = {
    "gpt-2": _Pre((_GPT2,)),
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "llama-bpe": _Pre((_LLAMA3,), whole=True),
    "smaug-bpe": _Pre((_LLAMA3,)),
    "qwen2": _Pre((_QWEN2,)),
    "deepseek-coder": _Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
# Every difference between the pre-tokenizers above shows in one of these.
PROBES = (
    "Hello world, it's 2024: I'VE won'T we'll THEY'D o'clock 'tis ''s",
    "  two\n\n\n  three \t\t tab\r\n\r\nend   \n \t \n",
    "1 12 123 1234 12345678 3.14159 1,000,000 x2y3   7  88 ½ Ⅷ ١٢٣٤ 漢字12字345",
    "naïve façade e\u0301a\u0308 Ünïcode 漢字かな交じり文 한국어 русский العربية ไทย हिन्दी",
    "🚢🚀 (normal) 😶\u200d🌫️ (joined) ✅ 🦙🦙 «quoted» — dash… “smart” ‘quotes’",
    "def f(x):\n    return x**2 + y[i]  # ===>>> !!!??? ...\n\n\tif (a<=b)&&c||d {}\n",
    "snake_case camelCase http://a.b/c?d=e&f=g#h $5.00 50% a+b=c <tag/> ~|^ `code` \"\"\"'''",
    "trailing spaces   ",
    " \u00a0nbsp\u2003em\u3000wide\u200bzero",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. `tokens` and `types` (numbers of `gguf.TokenType`) have a place for every
    id of the model; `special`: such as `bos` → its id; `adds`: whether `bos` and `eos` are added to a text. One of
    SentencePiece has `scores` in the place of `merges`, and may put a space before a text (`prefixed`)."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    template: Any = None
    remarks: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    prefixed: bool = False

    def describe(self, writer: Any) -> None:
        """Put it into a `GGUFWriter`."""
        writer.add_tokenizer_model("llama" if self.scores else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefixed)
        else:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, size: int, ends: tuple[int, ...]) -> Vocabulary:
    """What llama.cpp needs of a fast `tokenizer` of transformers, for a model with `size` embeddings whose texts end
    with one of `ends`. Raises `UnsupportedError` for a tokenizer that llama.cpp would not follow."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_of(tokenizer.backend_tokenizer)
    tokens, types = _tokens(tokenizer.backend_tokenizer, described, size)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    every = list(dict.fromkeys(each for each in (special["eos"], *ends) if each is not None))
    if not every:
        raise UnsupportedError("the model has no end-of-text token; llama.cpp would take token 11 for it",
                               hint="give eos_token_id in config.json")  # fmt: skip
    special |= dict(zip(("eos", "eot", "eom"), every, strict=False))
    if special["bos"] is None:  # llama.cpp would take token 11
        special["bos"] = special["eos"]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    spm = _gguf_spm.is_one(described)
    return Vocabulary(
        pre, tokens, types, () if spm else tuple(_merges(described["model"]["merges"])),
        {name: number for name, number in special.items() if number is not None},
        _added(tokenizer.backend_tokenizer, special), template, tuple(_remarks(described, every)),
        _gguf_spm.score_list(tokens, _gguf_spm.scores(described)) if spm else (),
        spm and _gguf_spm.prefix(described) != "never",
    )  # fmt: skip


def pre_tokenizer_of(tokenizer: Any) -> str:
    """The id of the pre-tokenizer of llama.cpp that cuts `PROBES` as the `tokenizers.Tokenizer` does; of one of
    SentencePiece, which cuts nothing, `default`. Raises `UnsupportedError` where there is none, or where what comes
    before or after is not llama.cpp's."""
    described = json.loads(tokenizer.to_str())
    model, normaliser = described["model"], described["normalizer"]
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise UnsupportedError("llama.cpp knows no BPE with dropout, prefixes or suffixes of words")
    if _gguf_spm.is_one(described):
        _gguf_spm.check(described)
        return "default"
    if model["type"] != "BPE" or tokenizer.pre_tokenizer is None:
        raise UnsupportedError(
            "GGUF is written for BPE tokenizers: byte-level (GPT-2, Llama 3, Qwen2), or SentencePiece's (Llama 2)",
            hint="llama.cpp's own convert_hf_to_gguf.py knows more",
        )
    if normaliser is not None and normaliser["type"] != "NFC":
        raise UnsupportedError(f"llama.cpp would not normalise text as tokenizer.json does ({normaliser['type']})")
    cut = [_pieces(tokenizer.pre_tokenizer, probe) for probe in PROBES]
    for name, pre in PRE_TOKENIZERS.items():
        ours = _splitter(pre)
        same = all(_pieces(ours, probe) == found for probe, found in zip(PROBES, cut, strict=True))
        if same and pre.whole == bool(model.get("ignore_merges")):
            return name
    raise UnsupportedError(
        "no pre-tokenizer of llama.cpp that is known here cuts text as tokenizer.json does",
        hint=f"known are {', '.join(PRE_TOKENIZERS)}; llama.cpp's own convert_hf_to_gguf.py knows more",
    )


def check_ids(metadata: Mapping[str, Any], tokenizer: Any) -> None:
    """Compare the tokenizer that `metadata` (of a GGUF file) makes of llama.cpp with the `tokenizers.Tokenizer` it came
    from, on `PROBES` and every added token. Raises `UnsupportedError` with the first text that gets other ids."""
    encode = reader(metadata)
    first = [metadata["tokenizer.ggml.bos_token_id"]] if metadata["tokenizer.ggml.add_bos_token"] else []
    last = [metadata["tokenizer.ggml.eos_token_id"]] if metadata["tokenizer.ggml.add_eos_token"] else []
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    described = json.loads(tokenizer.to_str())
    if _gguf_spm.is_one(described):
        texts = list(_gguf_spm.alike(described, PROBES, added))
    else:
        texts = [*PROBES, *(f"a {token} b{token}\n{token}9" for token in added)]
    for text in texts:
        text = unicodedata.normalize("NFC", text)
        expected, got = tokenizer.encode(text).ids, [*first, *encode(text), *last]
        if got != expected:
            raise UnsupportedError(
                f"llama.cpp would cut {text!r} into {got[:12]}, tokenizer.json into {expected[:12]}",
                hint="added tokens that take spaces with them, or need to be single words, have no place in GGUF",
            )


def reader(metadata: Mapping[str, Any]) -> Callable[[str], list[int]]:
    """Text → ids as llama.cpp cuts it with a GGUF file of this metadata, bos and eos left out."""
    if "tokenizer.ggml.scores" in metadata:
        return _gguf_spm.Reader(metadata).encode
    tokenizer = rebuilt(metadata)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def rebuilt(metadata: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` that does what llama.cpp does with a GGUF file of this metadata, bos and eos left out.

    Control tokens are found in text, as `/tokenize` with `parse_special` does."""
    from tokenizers import AddedToken, Tokenizer, models

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pre = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.whole))
    tokenizer.pre_tokenizer = _splitter(pre)
    for kind in (_CONTROL, _DEFINED):
        found = [token for token, each in zip(tokens, types, strict=True) if each == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in found])
    return tokenizer


# ── Parts ───────────────────────────────────────────────────────────────────

_NORMAL, _CONTROL, _DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def _splitter(pre: _Pre) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(pre_tokenizer: Any, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _tokens(tokenizer: Any, described: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text and the type of every id; those of the model that the tokenizer does not use are filled up."""
    known = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(known) >= size:
        raise UnsupportedError(f"the tokenizer has the token {max(known)}, the model {size} embeddings")
    added = {token["id"]: _CONTROL if token["special"] or _seems_special(token["content"]) else _DEFINED
             for token in described["added_tokens"]}  # fmt: skip
    unknown = described["model"].get("unk_token")
    tokens, types = [], []
    for number in range(size):
        tokens.append(known.get(number, f"[PAD{number}]"))
        if number not in known:
            types.append(_UNUSED)
        elif _gguf_spm.is_one(described):
            types.append(_gguf_spm.type_of(known[number], number, added, unknown))
        else:
            types.append(added.get(number, _NORMAL))
    return tuple(tokens), tuple(types)


def _seems_special(token: str) -> bool:
    """Whether llama.cpp takes a token for a control token by its looks, as its own converter does too."""
    return any(token.startswith(first) and token.endswith(last) for first, last in (("<|", "|>"), ("<｜", "｜>")))


def _merges(merges: list[Any]) -> Iterator[str]:
    """Each pair as one text; older files have that already."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(pair) != 2 or any(" " in part for part in pair):
            raise UnsupportedError(f"a merge of the tokenizer holds a space: {merge!r}")
        yield " ".join(pair)


def _added(tokenizer: Any, special: Mapping[str, Any]) -> dict[str, bool]:
    """Whether bos and eos are added to a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        if full == [special["bos"]] * bos + bare + [special["eos"]] * eos:
            return {"bos": bos, "eos": eos}
    raise UnsupportedError(f"tokenizer.json makes {full} of 'a'; GGUF can add one begin and one end token only")


def _remarks(described: Mapping[str, Any], ends: list[int]) -> Iterator[str]:
    if _gguf_spm.is_one(described):
        yield from _gguf_spm.remarks(described)
    elif described["normalizer"] is not None:
        yield "llama.cpp does not normalise text (NFC): letters written as letter and accent get other ids there"
    if len(ends) > 3:
        yield f"GGUF has room for three tokens that end a text; left out: {', '.join(map(str, ends[3:]))}"
