"""Drop the tokens that a corpus does not need, from tokenizer, embedding and head. All text can still be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from lightship.calibration import Text, read_text, render_with, whole_text
from lightship.checkpoint import Checkpoint, read_json, sha256
from lightship.compression._named_ids import named
from lightship.compression._tables import cut_tables
from lightship.compression._tokenizer_files import Pieces, TokenizerFiles
from lightship.encoder import OFFSET, Encoder
from lightship.errors import UnsupportedError, UsageError
from lightship.kept import Kept
from lightship.kind import GENERATORS
from lightship.step import Context, Need, Step
from lightship.template import load_template

PIECE, OVERLAP = 4_000_000, 256  # characters tokenised at a time, and those read again so that no token is cut
Counts = npt.NDArray[np.int64]


class Vocabulary(Step):
    """Keep the tokens that a corpus and the special tokens need, drop the rows of all others.

    Kept are always: added and special tokens, ids that the configuration names, what the chat template says, and the
    bytes or characters of which any text can be made. A token is kept with the tokens that it is merged from. Text
    whose tokens are all kept has the same tokens as before; other text has more, shorter ones.
    """

    serves: ClassVar[Need] = "memory"
    trial: ClassVar[Mapping[str, Any]] = {"keep": 0.5}

    keep: int | float | None = Field(
        None, gt=0, allow_inf_nan=False, description="share (up to 1) or number of tokens to keep, the most frequent "
        "in the corpus first, then by id; by default all that occur in it",
    )  # fmt: skip
    corpus: str | None = Field(
        None, description="path of a text, or of chat JSONL, of the kind to be read and written; by default the text "
        "that calibrates",
    )  # fmt: skip
    minimum: int = Field(1, ge=1, description="a token found less often in the corpus counts as not found")
    multiple: int = Field(1, ge=1, description="round the number of tokens up to a multiple, keeping further ones")

    @model_validator(mode="after")
    def _whole(self) -> Vocabulary:
        if self.keep is not None and self.keep > 1 and self.keep != int(self.keep):
            raise UsageError(f"keep is {self.keep}, expected a share up to 1 or a whole number of tokens")
        return self

    def refuse(self, config: Mapping[str, Any]) -> None:
        shared = config.get("share_encoder_decoder_embeddings", True)
        if not shared or config.get("decoder_vocab_size") not in (None, config.get("vocab_size")):
            raise UnsupportedError("a model with one vocabulary to read and another to write cannot be cut",
                                   hint="leave the step vocabulary out")  # fmt: skip

    def files(self) -> list[Path]:
        return [] if self.corpus is None else [Path(self.corpus)]

    def texts(self, checkpoint: Checkpoint) -> list[Text]:
        if self.corpus is None:
            return []
        path = Path(self.corpus)
        if path.suffix != ".jsonl":
            return [whole_text(path)]
        template = load_template(checkpoint.folder)
        if template is None:
            raise UsageError(f"{path} is a chat, and the model has no chat template", hint="give plain text")
        return [read_text(path, render_with(template.render))]

    def apply(self, checkpoint: Checkpoint, folder: Path, context: Context) -> Checkpoint:
        """`checkpoint` with fewer tokens, written into the new `folder` in its own dtype. Raises `UsageError` when
        `keep` is less than what must be kept."""
        files, size = TokenizerFiles.of(checkpoint), checkpoint.vocabulary
        texts = list(self._pieces(checkpoint, context))
        counts = np.zeros(size, np.int64)
        for text in texts:
            np.add.at(counts, files.encode(text), 1)
        counts[counts < self.minimum] = 0
        kept, least = self._select(files.pieces, files.required() | _named(checkpoint), counts)
        context.say(f"{len(kept)} of {size} tokens kept, {least} at least")
        record = checkpoint.kept.cut(np.array(kept)) if checkpoint.kept else Kept(size, np.array(kept))
        model = checkpoint.load("float32")
        cut_tables(model, kept)
        figures: dict[str, Any] = {"kept": len(kept), "of": size, "least": least, "found": int((counts > 0).sum())}
        if self.corpus is not None:
            figures["corpus"] = sha256(Path(self.corpus))
        with tempfile.TemporaryDirectory() as place:
            files.write(Path(place), record, {token: row for row, token in enumerate(kept)})
            files.check(Path(place), kept, texts)
            return self.write(model, checkpoint, folder, context, figures, tokenizer_files=Path(place))

    def _pieces(self, checkpoint: Checkpoint, context: Context) -> Iterator[str]:
        """The corpus, in pieces, as the model reads it."""
        lower = checkpoint.kind not in GENERATORS and Encoder.load(checkpoint.folder).lower
        corpus = self.texts(checkpoint) or [context.text]
        for text in (document.text for each in corpus for document in each.documents):
            for start in range(0, len(text), PIECE):
                piece = text[max(0, start - OVERLAP) : start + PIECE + OVERLAP]
                yield piece.lower() if lower else piece

    def _select(self, pieces: Pieces, required: set[int], counts: Counts) -> tuple[list[int], int]:
        """The ids to keep, ascending, and how many must be."""
        known = set(pieces.tokens())
        kept = set(required)
        for token in required & known:
            kept |= pieces.parts(token)
        least = len(kept)
        order = sorted(known, key=lambda token: (-counts[token], token))
        if self.keep is None:
            for token in np.flatnonzero(counts).tolist():
                kept |= pieces.parts(token) if token in known else frozenset([token])
        wanted = len(kept) if self.keep is None else int(self.keep * len(counts) if self.keep <= 1 else self.keep)
        if wanted < least:
            raise UsageError(
                f"keep is {self.keep}, that is {wanted} of {len(counts)} tokens; {least} must be kept",
                hint=f"keep {least} or more: the special ones, the chat template's, bytes or characters",
            )
        wanted = min(-(-wanted // self.multiple) * self.multiple, len(kept | known))
        before = -1
        while before < len(kept) < wanted:  # a token with more parts than there is room for lets others pass
            before = len(kept)
            for token in order:
                parts = pieces.parts(token) if token not in kept else frozenset()
                if len(kept) + len(parts - kept) <= wanted:
                    kept |= parts
        return sorted(kept), least


def _named(checkpoint: Checkpoint) -> set[int]:
    """The ids that the configuration names; of a model that counts its positions from the padding id on, which must
    stay what it is, those up to it too."""
    path = checkpoint.folder / "generation_config.json"
    config, generation = checkpoint.config, read_json(path) if path.is_file() else {}
    found = named(config, checkpoint.vocabulary) | named(generation, checkpoint.vocabulary)
    if config.get("model_type") in (*OFFSET, "m2m_100"):
        found |= set(range((config.get("pad_token_id") or 0) + 1))
    return found
