"""The tokenizer files of a checkpoint: which tokens they cannot do without, and the files for those that are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from lightship.checkpoint import TOKENIZER_FILES, Checkpoint, read_json, write_json
from lightship.compression._bpe import BPE
from lightship.compression._unigram import Unigram
from lightship.compression._wordpiece import WordPiece
from lightship.errors import LightshipError, UnsupportedError
from lightship.kept import FILE as KEPT_FILE
from lightship.kept import Kept
from lightship.template import literals
from lightship.tokenizer import check_vocabulary, load_tokenizer

DROPPED = ("vocab.json", "merges.txt", "*.model")  # they say again, in older forms, what tokenizer.json says
CHECKED = 1000  # lines of the corpus that are read again after the cut
ROLES = ("system", "user", "assistant", "tool")  # stand in no template, and in every chat


class Pieces(Protocol):
    """The `model` of a tokenizer.json: see the classes for how it makes tokens of a text."""

    def tokens(self) -> list[int]: ...
    def required(self) -> set[int]: ...
    def parts(self, token: int) -> frozenset[int]: ...
    def cut(self, new: Mapping[int, int]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TokenizerFiles:
    """Those of one checkpoint: `whole` is the content of its tokenizer.json, `pieces` the model within."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    whole: Mapping[str, Any]
    pieces: Pieces

    @staticmethod
    def of(checkpoint: Checkpoint) -> TokenizerFiles:
        """Raises `SourceError` for no tokenizer.json, `UnsupportedError` for one whose tokens are made another way."""
        tokenizer = load_tokenizer(checkpoint.folder)
        check_vocabulary(tokenizer, checkpoint.vocabulary, checkpoint.folder)
        whole = json.loads(Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).to_str())
        model = whole["model"]
        if model["type"] == "BPE":
            return TokenizerFiles(checkpoint, tokenizer, whole, BPE.of(model))
        if model["type"] in ("Unigram", "WordPiece"):
            pieces = Unigram(model) if model["type"] == "Unigram" else WordPiece(model)
            return TokenizerFiles(checkpoint, tokenizer, whole, pieces)
        raise UnsupportedError(f"the vocabulary of a {model['type']} tokenizer cannot be cut",
                               hint="known are BPE, Unigram and WordPiece")  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def required(self) -> set[int]:
        """The ids of added and special tokens, of what the chat templates say, and of what every text may need."""
        found: set[int] = {entry["id"] for entry in self.whole["added_tokens"]}

        def note(token: int) -> int:
            found.add(token)
            return token

        self._others(note)
        found.update(token for text in self._said() for token in self.encode(text))
        return found | self.pieces.required()

    def _said(self) -> list[str]:
        """What the chat templates say, alone and after a special token: a beginning may be read in another way."""
        said = literals(self.checkpoint.folder)
        marks = [entry["content"] for entry in self.whole["added_tokens"] if entry["special"]][:1]
        return [before + text for text in ([*said, *ROLES] if said else []) for before in ("", *marks)]

    def _others(self, change: Callable[[int], int]) -> dict[str, Any]:
        """The parts of tokenizer.json beside the model that hold ids, these changed."""
        added = [{**entry, "id": change(entry["id"])} for entry in self.whole["added_tokens"]]
        padding = self.whole["padding"]
        if padding is not None:
            padding = {**padding, "pad_id": change(padding["pad_id"])}
        return {"added_tokens": added, "padding": padding,
                "post_processor": _processor(self.whole["post_processor"], change)}  # fmt: skip

    def write(self, folder: Path, kept: Kept, new: Mapping[int, int]) -> None:
        """The files for the tokens in `new`, old → new id, into `folder`; what was kept of the original is `kept`."""
        source = self.checkpoint.folder
        left_out = {path for pattern in DROPPED for path in source.glob(pattern)}
        for path in sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)} - left_out):
            place = folder / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
        changed = {**self.whole, **self._others(lambda token: new[token]), "model": self.pieces.cut(new)}
        Tokenizer.from_str(json.dumps(changed)).save(str(folder / "tokenizer.json"))
        path = folder / "added_tokens.json"
        if path.is_file():
            write_json(path, {text: new[token] for text, token in read_json(path).items()})
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"].items()
            write_json(path, {**config, "added_tokens_decoder": {str(new[int(key)]): value for key, value in entries}})
        write_json(folder / KEPT_FILE, kept.written())

    def check(self, folder: Path, kept: Sequence[int], texts: Sequence[str]) -> None:
        """Raise `LightshipError` unless the files in `folder` make the same tokens, `kept[i]` being token i, of every
        added token, of what the templates say, and of those among the first lines of `texts` whose tokens are kept."""
        cut, known = load_tokenizer(folder), set(kept)
        lines = (line for text in texts for line in text.split("\n"))
        added = [entry["content"] for entry in self.whole["added_tokens"]]
        for text in (*added, *self._said(), *islice(lines, CHECKED)):
            before = self.encode(text)
            after = cut.encode(text, add_special_tokens=False).ids
            if known.issuperset(before) and [kept[token] for token in after] != before:
                raise LightshipError(
                    f"the tokenizer reads {text[:80]!r} in another way after the cut",
                    hint="leave the step vocabulary out: this tokenizer works in a way not known here",
                )


def _processor(value: Any, change: Callable[[int], int]) -> Any:
    """A post-processor with its ids changed. Raises `UnsupportedError` for one that is not known."""
    kind = None if value is None else value["type"]
    if kind is None or kind == "ByteLevel":
        return value
    if kind == "Sequence":
        return {**value, "processors": [_processor(each, change) for each in value["processors"]]}
    if kind == "TemplateProcessing":
        tokens = {name: {**entry, "ids": [change(token) for token in entry["ids"]]}
                  for name, entry in value["special_tokens"].items()}  # fmt: skip
        return {**value, "special_tokens": tokens}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**value, **{name: [value[name][0], change(value[name][1])] for name in ("sep", "cls")}}
    raise UnsupportedError(
        f"the vocabulary of a tokenizer whose post-processor is {kind} cannot be cut",
        hint="known are TemplateProcessing, BertProcessing, RobertaProcessing and ByteLevel",
    )
