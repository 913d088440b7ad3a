"""Tokens of WordPiece: from the left, the longest token that fits is taken.

A token taken before is the longest of fewer tokens too, if it is kept; so a text whose tokens are all kept is cut as it
was. Another falls back on shorter tokens, down to single characters: of a word that had tokens each has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WordPiece:
    """The `model` of a tokenizer.json of type WordPiece."""

    model: Mapping[str, Any]

    def tokens(self) -> list[int]:
        """The ids of the model, ascending."""
        return sorted(self.model["vocab"].values())

    def required(self) -> set[int]:
        """Ids without which some word could not be encoded any more: of single characters, at the beginning of a word
        or within, and of tokens with a character that has none."""
        vocabulary = self.model["vocab"]
        needed = {token for text, token in vocabulary.items() if not self._spelled(text)}
        return needed | {token for text, token in vocabulary.items() if text == self.model["unk_token"]}

    def _spelled(self, text: str) -> bool:
        """Whether a token of several characters can be written in tokens of one."""
        inner = self.model["continuing_subword_prefix"]
        within = text.startswith(inner) and len(text) > len(inner)
        characters = text.removeprefix(inner) if within else text
        names = [inner + character if within or at else character for at, character in enumerate(characters)]
        return len(names) > 1 and all(name in self.model["vocab"] for name in names)

    def parts(self, token: int) -> frozenset[int]:
        """A token needs no other."""
        return frozenset([token])

    def cut(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model with the ids in `new`, old → new."""
        return {
            **self.model,
            "vocab": {text: new[token] for text, token in self.model["vocab"].items() if token in new},
        }
