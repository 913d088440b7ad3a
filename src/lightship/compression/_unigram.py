"""Tokens of a unigram language model: the segmentation of highest total score is taken.

Scores stay, so a segmentation whose tokens are all kept has the score that it had, and those that are left to compare
with had at most that. Ties are decided by the order in which they are met, which stays too. The penalty of an unknown
character is reckoned from the lowest score, so a token of that score is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightship.compression._bpe import BYTES


@dataclass(frozen=True)
class Unigram:
    """The `model` of a tokenizer.json of type Unigram: token i is entry i of its `vocab`."""

    model: Mapping[str, Any]

    def tokens(self) -> list[int]:
        """The ids of the model, ascending."""
        return list(range(len(self.model["vocab"])))

    def required(self) -> set[int]:
        """Ids without which some text could not be encoded any more, or unknown characters would weigh differently."""
        texts = {text: token for token, (text, _) in enumerate(self.model["vocab"])}
        unknown = set() if self.model.get("unk_id") is None else {int(self.model["unk_id"])}
        spelled = {texts[byte] for byte in BYTES if byte in texts}
        lowest = min(self.tokens(), key=lambda token: self.model["vocab"][token][1])
        needed = unknown | spelled | {lowest}
        if self.model.get("byte_fallback") and len(spelled) == len(BYTES):
            return needed
        return needed | {token for text, token in texts.items() if len(text) == 1 or any(c not in texts for c in text)}

    def parts(self, token: int) -> frozenset[int]:
        """A token needs no other."""
        return frozenset([token])

    def cut(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model with the ids in `new`, old → new, which keep their order."""
        unknown = self.model.get("unk_id")
        kept = [entry for token, entry in enumerate(self.model["vocab"]) if token in new]
        return {**self.model, "vocab": kept, "unk_id": None if unknown is None else new[unknown]}
