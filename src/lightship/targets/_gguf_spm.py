"""A BPE tokenizer of SentencePiece (Llama 2) as llama.cpp reads it: tokens whose scores say which merge comes first.

llama.cpp joins the two neighbours whose union is the token of the highest score, whatever they are; `tokenizer.json`
lists which two may be joined, in order. Both do the same where every way to make a token is listed, and the ways to
make one token are not mixed up with those to make another: that is checked, and the order becomes the scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from lightship.errors import UnsupportedError

SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6  # gguf.TokenType
# Where a space is put before text: before each part between added tokens (every), but for those that begin with one
# (always), before the first part (first), or nowhere.
Prefix = Literal["every", "always", "first", "never"]
NEVER = -1e6  # the score of what no merge makes


def is_one(described: Mapping[str, Any]) -> bool:
    """Whether what `tokenizer.json` holds is BPE of characters, with bytes for those that it does not know."""
    return bool(described["model"]["type"] == "BPE" and described["model"].get("byte_fallback"))


def check(described: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for what llama.cpp would do otherwise."""
    model = described["model"]
    missing = [token for token in BYTES if token not in model["vocab"]]
    if missing:
        raise UnsupportedError(f"the tokenizer lacks {len(missing)} of the 256 bytes, such as {missing[0]}; llama.cpp "
                               "needs all")  # fmt: skip
    prefix(described)
    scores(described)


def prefix(described: Mapping[str, Any]) -> Prefix:
    """Where a space is put before text. Raises `UnsupportedError` for other changes to it, or other cuts."""
    normaliser, cut = described["normalizer"], described["pre_tokenizer"]
    parts = [] if normaliser is None else normaliser.get("normalizers", [normaliser])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cut is None and parts == [{"type": "Prepend", "prepend": SPACE}, spaces]:
        return "every"
    if cut is None and parts == [spaces]:
        return "never"
    found: Prefix | None = None
    if not parts and cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True):
        found = cut["prepend_scheme"]
    if found is None:
        raise UnsupportedError("llama.cpp would prepare text otherwise than tokenizer.json of this SentencePiece "
                               "tokenizer does")  # fmt: skip
    return found


def remarks(described: Mapping[str, Any]) -> Iterator[str]:
    """Where llama.cpp puts a space and the tokenizer does not."""
    where = prefix(described)
    if where in ("always", "first"):
        yield "llama.cpp puts a space before a text that begins with one too, tokenizer.json does not"
    if where == "first":
        yield "llama.cpp puts a space before what follows a control token, tokenizer.json does not"


def alike(described: Mapping[str, Any], probes: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """Texts that both must cut alike, whatever `remarks` says: of `probes`, and with each `added` token."""
    where = prefix(described)
    for probe in probes:
        yield probe.lstrip(" ") if where in ("always", "first") else probe
    for token in added:
        if where == "first":
            yield f"a {token}"
        else:
            yield f"a {token}{'' if where == 'always' else ' '}b{token}\n{token}9"


def scores(described: Mapping[str, Any]) -> dict[str, float]:
    """The score of every token that merges make: 0 for those that come first, then lower. Raises `UnsupportedError`
    where the merges are not what scores can say."""
    known = described["model"]["vocab"]
    ranks: dict[str, list[int]] = {}
    ways: set[tuple[str, str]] = set()
    for rank, merge in enumerate(described["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ways.add((left, right))
        ranks.setdefault(left + right, []).append(rank)
    added = {token["content"] for token in described["added_tokens"]}
    made = ranks.keys() | {token for token in known if len(token) == 1}
    for token in known.keys() - added - set(BYTES):
        for at in range(1, len(token)):
            way = (token[:at], token[at:])
            if way not in ways and all(len(part) == 1 or part in made for part in way):
                raise UnsupportedError(f"llama.cpp would join {way[0]!r} and {way[1]!r} to the token {token!r}, "
                                       "tokenizer.json does not")  # fmt: skip
    ordered = sorted(ranks, key=lambda token: ranks[token][0])
    last = -1
    for token in ordered:
        if ranks[token][0] < last:
            raise UnsupportedError(f"the merges that make {token!r} are mixed up with those of another token; "
                                   "llama.cpp has one score for a token")  # fmt: skip
        last = ranks[token][-1]
    return {token: -float(place) for place, token in enumerate(ordered)}


class Reader:
    """What llama.cpp makes of text with a GGUF file of this metadata, begin and end left out; control tokens are found
    in text, as `/tokenize` with `parse_special` does. After `llm_tokenizer_spm_session` (src/llama-vocab.cpp)."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._scores = metadata["tokenizer.ggml.scores"]
        self._prefixed = bool(metadata["tokenizer.ggml.add_space_prefix"])
        special = [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, DEFINED)]
        special.sort(key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})")

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        found: list[int] = []
        after_special = True
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                found.append(self._ids[part])
            elif part:
                prefix = " " if self._prefixed and after_special else ""
                found += self._joined(list((prefix + part).replace(" ", SPACE)))
            after_special = bool(number % 2)
        return found

    def _joined(self, parts: list[str]) -> list[int]:
        """The neighbours of the highest score first, of several the leftmost."""
        while True:
            scored = [(-self._scores[self._ids[both]], at)
                      for at, both in enumerate(map("".join, pairwise(parts)))
                      if both in self._ids]  # fmt: skip
            if not scored:
                return [number for part in parts for number in self._numbers(part)]
            _, at = min(scored)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def _numbers(self, part: str) -> Iterator[int]:
        if part in self._ids:
            yield self._ids[part]
        else:
            yield from (self._ids[BYTES[byte]] for byte in part.encode())


def type_of(token: str, number: int, added: Mapping[int, int], unknown: str | None) -> int:
    """The type of a token of the tokenizer; `added`: id → type of those that were added to it."""
    if token == unknown:
        return UNKNOWN
    return added.get(number, BYTE if token in BYTES else NORMAL)


def score_list(tokens: Sequence[str], found: Mapping[str, float]) -> tuple[float, ...]:
    """A score for every token: of single characters, which nothing makes, it does not matter."""
    return tuple(found.get(token, NEVER) for token in tokens)
