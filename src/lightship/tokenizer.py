"""The tokenizer of a checkpoint or runtime folder, without transformers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from lightship.errors import SourceError


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
