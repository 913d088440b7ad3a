"""Tokens of byte-pair encoding: each comes about by merges, and a merge needs the tokens that it joins.

A token is kept with every token that appears while its own text is merged. Why that is enough: merging always takes the
pair of lowest rank. If all merges of a text are kept, the pair taken is still there at every step, and dropped merges
only take others away; so the same pairs are taken, and the same tokens come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lightship.errors import UnsupportedError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class BPE:
    """The `model` of a tokenizer.json of type BPE."""

    model: Mapping[str, Any]
    _ranks: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict, repr=False)
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(model: Mapping[str, Any]) -> BPE:
        """Raises `UnsupportedError` for merges that work on other parts than characters."""
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise UnsupportedError(
                    f"the vocabulary of a tokenizer with a {name} cannot be cut",
                    hint="only byte-pair encoding of characters or bytes is known here",
                )
        vocabulary = model["vocab"]
        ranks = {}
        for rank, (left, right) in enumerate(_pairs(model["merges"])):
            ranks[vocabulary[left], vocabulary[right]] = (rank, vocabulary[left + right])
        return BPE(model, ranks, {token: text for text, token in vocabulary.items()})

    def tokens(self) -> list[int]:
        """The ids of the model, ascending."""
        return sorted(self._texts)

    def required(self) -> set[int]:
        """Ids without which some text could not be encoded any more: of the bytes where a character that has no token
        is spelled in bytes, else of the characters."""
        vocabulary = self.model["vocab"]
        unknown = {vocabulary[self.model["unk_token"]]} if self.model.get("unk_token") in vocabulary else set()
        spelled = {vocabulary[byte] for byte in BYTES if byte in vocabulary}
        if self.model.get("byte_fallback") and len(spelled) == len(BYTES):
            return unknown | spelled
        return unknown | spelled | {token for text, token in vocabulary.items() if len(text) == 1}

    def parts(self, token: int) -> frozenset[int]:
        """`token` and all that appear while its text is merged; only itself where merging does not lead to it."""
        symbols = [self.model["vocab"].get(character) for character in self._texts[token]]
        if None in symbols:
            return frozenset([token])
        seen = set(symbols)
        while len(symbols) > 1:
            found = [(*self._ranks[pair], at) for at, pair in enumerate(pairwise(symbols))
                     if pair in self._ranks]  # fmt: skip
            if not found:
                break
            _, joined, at = min(found, key=lambda each: (each[0], each[2]))
            symbols[at : at + 2] = [joined]
            seen.add(joined)
        return frozenset(seen) if symbols == [token] else frozenset([token])

    def cut(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model with the ids in `new`, old → new: every merge whose parts and result are kept, in its order."""
        kept = {text: new[token] for text, token in self.model["vocab"].items() if token in new}
        merges = [[left, right] for left, right in _pairs(self.model["merges"])
                  if left in kept and right in kept and left + right in kept]  # fmt: skip
        return {**self.model, "vocab": kept, "merges": merges}


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges are pairs, or in older files texts with a space between."""
    found = (each.split(" ", 1) if isinstance(each, str) else each for each in merges)
    return [(left, right) for left, right in found]
