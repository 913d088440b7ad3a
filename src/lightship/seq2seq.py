"""An encoder-decoder without its weights: tokenizer, bounds, and the tokens around a text. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lightship.checkpoint import Checkpoint, context_length, read_json
from lightship.errors import SourceError
from lightship.tokenizer import check_ids, check_vocabulary, load_tokenizer

Ids = npt.NDArray[np.int64]
RELATIVE = ("mt5", "t5", "umt5")  # positions by distance: no length is named, these were trained on 512 tokens
RELATIVE_CONTEXT = 512


@dataclass(frozen=True)
class Seq2Seq:
    """A checkpoint or runtime folder as everybody but the runtime sees it.

    `context` in tokens, of the source and of what is written, special ones included; `start`: the ids that every
    written text begins with, given and not generated; `eos`: those that end one; `never`: ids that are not generated;
    `pad` fills rows.
    """

    context: int
    vocabulary: int
    pad: int
    start: tuple[int, ...]
    eos: tuple[int, ...]
    never: tuple[int, ...]
    tokenizer: Tokenizer

    @staticmethod
    def load(folder: Path) -> Seq2Seq:
        """Read and check the folder's files. Raises `SourceError` for what does not fit."""
        checkpoint = Checkpoint(folder)
        config = _generation(folder)
        pad = _pad(config, folder)
        found = Seq2Seq(
            context=_context(checkpoint, pad),
            vocabulary=checkpoint.vocabulary,
            pad=pad,
            start=_start(config, folder),
            eos=checkpoint.eos_token_ids,
            never=_never(config),
            tokenizer=load_tokenizer(folder),
        )
        check_vocabulary(found.tokenizer, found.vocabulary, folder)
        if max(*found.start, found.pad, *found.never) >= found.vocabulary:
            raise SourceError(f"{folder}: a special token id is not below the vocabulary of {found.vocabulary}")
        return found

    def frame(self, ids: Sequence[int]) -> list[int]:
        """`ids` of a text with the special tokens that the tokenizer puts around one."""
        plain, whole = (self.tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return [*whole[:at], *ids, *whole[at + len(plain) :]]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
        """`rows` as one batch, padded on the right: ids and mask, each (batch, length)."""
        ids = np.full((len(rows), max(map(len, rows))), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return ids, mask

    def check(self, ids: Sequence[int], param: str | None = "input") -> None:
        """Raise `RequestError` for a source without tokens, with foreign ids or longer than the context."""
        check_ids(ids, self.vocabulary, self.context, param)


def _context(checkpoint: Checkpoint, pad: int) -> int:
    kind = checkpoint.config.get("model_type")
    if kind in RELATIVE:
        return context_length(checkpoint.config) or RELATIVE_CONTEXT
    if kind == "m2m_100":  # positions are counted from the padding id on, in a table that has room for an id of 1
        return checkpoint.context_length + min(1 - pad, 0)
    return checkpoint.context_length


def _generation(folder: Path) -> dict[str, Any]:
    """`config.json` with what `generation_config.json` says instead."""
    path = folder / "generation_config.json"
    said = read_json(path) if path.is_file() else {}
    return {**Checkpoint(folder).config, **{name: value for name, value in said.items() if value is not None}}


def _start(config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    first, forced = config.get("decoder_start_token_id"), config.get("forced_bos_token_id")
    if type(first) is not int or first < 0:
        raise SourceError(
            f"{folder} does not say with which token a text is begun: decoder_start_token_id is {first!r}",
            hint="add it to generation_config.json, as the model was trained",
        )
    return (first,) if type(forced) is not int else (first, forced)


def _pad(config: dict[str, Any], folder: Path) -> int:
    pad = config.get("pad_token_id")
    if type(pad) is not int or pad < 0:
        raise SourceError(f"{folder / 'config.json'}: pad_token_id is {pad!r}, expected an id")
    return pad


def _never(config: dict[str, Any]) -> tuple[int, ...]:
    """Single tokens among the `bad_words_ids`: Marian names its padding there."""
    return tuple(int(word[0]) for word in config.get("bad_words_ids") or () if len(word) == 1)
