"""Text, split so that what calibrates never scores. Documents are assigned by a hash of their own words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightship.errors import UsageError

Encode = Callable[[str], list[int]]
Render = Callable[[list[dict[str, Any]]], list[tuple[str, bool]]]
CALIBRATION_SHARE = 0.25


@dataclass(frozen=True)
class Document:
    """Pieces of text, each with whether it is scored (in a chat only the assistant's words are)."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """All pieces joined."""
        return "".join(text for text, _ in self.pieces)

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Text:
    """Named documents, without duplicates."""

    name: str
    documents: tuple[Document, ...]
    default: bool = False

    def split(self) -> tuple[Text, Text]:
        """(calibration, scoring): about a quarter of the documents by hash, and the rest; never overlapping."""
        bound = int(CALIBRATION_SHARE * 16**8)
        calibration = [doc for doc in self.documents if int(doc.digest[:8], 16) < bound]
        scoring = [doc for doc in self.documents if int(doc.digest[:8], 16) >= bound]
        if not calibration or not scoring:  # a single document or an unlucky few: by position
            calibration, scoring = list(self.documents[::4]), [d for i, d in enumerate(self.documents) if i % 4]
        return Text(self.name, tuple(calibration), self.default), Text(self.name, tuple(scoring), self.default)

    @property
    def digest(self) -> str:
        """SHA-256 over the documents' digests."""
        return hashlib.sha256("".join(doc.digest for doc in self.documents).encode()).hexdigest()

    def chunks(self, encode: Encode, length: int, count: int) -> list[tuple[list[int], list[bool]]]:
        """Up to `count` runs of exactly `length` tokens with their score marks, documents joined, none overlapping."""
        ids: list[int] = []
        marks: list[bool] = []
        for document in self.documents:
            for text, scored in document.pieces:
                found = encode(text)
                ids += found
                marks += [scored] * len(found)
            if len(ids) >= length * count:
                break
        whole = min(count, len(ids) // length)
        if not whole:
            raise UsageError(f"{self.name} gives {len(ids)} tokens; at least {length} are needed", hint="use a longer text")
        return [(ids[i * length : (i + 1) * length], marks[i * length : (i + 1) * length]) for i in range(whole)]


def _text(name: str, documents: Iterable[Document], default: bool = False) -> Text:
    unique = {document.digest: document for document in documents if document.text.strip()}
    if not unique:
        raise UsageError(f"{name} holds no text")
    return Text(name, tuple(unique.values()), default)


def default_text() -> Text:
    """The language reference that every Python carries (`pydoc_data.topics`): English prose with code."""
    from pydoc_data import topics

    documents = (Document(((text.strip() + "\n\n", True),)) for _, text in sorted(topics.topics.items()))
    return _text("pydoc_data.topics", documents, default=True)


def read_text(path: Path, render: Render) -> Text:
    """The text in `path`: chat when it ends in `.jsonl` (one {"messages": […]} a line), else plain.

    `render` turns messages into pieces, marking the assistant's. Raises `UsageError` naming the line at fault.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        return _text(path.name, (Document(tuple(render(_messages(path, *line)))) for line in lines))
    return _text(path.name, _paragraphs(content))


def _messages(path: Path, number: int, line: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(line)["messages"]
        if not messages or any(not isinstance(entry["content"], str) or not entry["role"] for entry in messages):
            raise ValueError("messages need a role and text content")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}, line {number}: expected {{"messages": [{{"role", "content"}}, …]}}, {error!r}') from error
    found: list[dict[str, Any]] = messages
    return found


def _paragraphs(content: str, least: int = 2000) -> Iterable[Document]:
    """Documents of whole paragraphs, each of at least `least` characters but the last."""
    held: list[str] = []
    for paragraph in content.split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= least:
            yield Document((("\n\n".join(held) + "\n\n", True),))
            held = []
    if held:
        yield Document((("\n\n".join(held), True),))
