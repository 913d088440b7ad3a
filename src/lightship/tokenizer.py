"""The tokenizer of a checkpoint or runtime folder, without transformers; and what its ids must keep to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lightship.errors import ContextTooLong, RequestError, SourceError


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json` of `folder`, with its truncation and padding switched off: a prompt is never cut silently."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no tokenizer.json", hint="save the model's fast tokenizer into the folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise SourceError(f"{path} cannot be read: {str(error)[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int, folder: Path) -> None:
    """Raise `SourceError` when `tokenizer` has more tokens than the model in `folder` has embeddings."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocabulary:
        raise SourceError(
            f"{folder}: the tokenizer has {size} tokens, the model {vocabulary} embeddings",
            hint="give the tokenizer that the model was trained with",
        )


def check_ids(ids: Sequence[int], vocabulary: int, context: int, param: str | None) -> None:
    """Raise `RequestError` for an input without tokens, with foreign ids, or longer than the context."""
    if not ids:
        raise RequestError("the input has no tokens", param)
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RequestError(f"token ids must lie in 0 … {vocabulary - 1}", param, "invalid_token_id")
    if len(ids) > context:
        raise ContextTooLong(f"This model's maximum context length is {context} tokens; the input has "
                             f"{len(ids)}. Nothing is cut off silently.", param)  # fmt: skip
