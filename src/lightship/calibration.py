"""Text, split so that what calibrates never scores. Documents are assigned by a hash of their own words."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightship.errors import UsageError

Encode = Callable[[str], list[int]]
Render = Callable[[list[dict[str, Any]]], list[tuple[str, bool]]]
CALIBRATION_SHARE = 0.25
DOCUMENT_CHARACTERS = 2000
REPEAT_CHARACTERS = 40  # a paragraph this long that occurs twice is a repetition, not a coincidence


@dataclass(frozen=True)
class Document:
    """Pieces of text, each with whether it is scored (in a chat only the assistant's words are). `messages`: (role,
    content) of a chat as it was given; a template may put today's date around them."""

    pieces: tuple[tuple[str, bool], ...]
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """All pieces joined."""
        return "".join(text for text, _ in self.pieces)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, or of the messages."""
        return hashlib.sha256((json.dumps(self.messages) if self.messages else self.text).encode()).hexdigest()

    def answers(self) -> set[str]:
        """What is scored, as far as it is long enough to be told from a stock phrase."""
        said = [text for text, scored in self.pieces if scored]
        if self.messages:
            said = [content for role, content in self.messages if role == "assistant"]
        return {text.strip() for text in said if len(text.strip()) >= REPEAT_CHARACTERS}


@dataclass(frozen=True)
class Passages:
    """Token sequences of one length to calibrate or score with.

    `masks[row][i]`: token i of the row is scored, that is predicted from the tokens before it (never token 0).
    `digest` is the SHA-256 of the text they come from. `bytes_per_token`: UTF-8 bytes of the scorable text divided by
    its tokens, over every document used; multiply by scored tokens for the bytes that bits per byte divides by.
    """

    sequences: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...], ...]
    name: str
    digest: str
    bytes_per_token: float

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(map(sum, self.masks))


@dataclass(frozen=True)
class Text:
    """Named documents, without duplicates."""

    name: str
    documents: tuple[Document, ...]
    default: bool = False

    def split(self) -> tuple[Text, Text]:
        """(calibration, scoring): about a quarter of the documents by hash, and the rest; never overlapping.

        Documents are ordered by digest, so neither their order in the file nor other documents move one across. A
        document that repeats an answer scored elsewhere (a conversation with one turn more) does not calibrate.
        """
        documents = sorted(self.documents, key=lambda document: document.digest)
        bound = int(CALIBRATION_SHARE * 16**8)
        calibration = [document for document in documents if int(document.digest[:8], 16) < bound]
        scoring = [document for document in documents if int(document.digest[:8], 16) >= bound]
        if not calibration or not scoring:  # an unlucky few: by position; a single document can only score
            calibration, scoring = documents[1::4], [doc for index, doc in enumerate(documents) if index % 4 != 1]
        scored = {piece for document in scoring for piece in document.answers()}
        calibration = [document for document in calibration if not scored & document.answers()]
        return Text(self.name, tuple(calibration), self.default), Text(self.name, tuple(scoring), self.default)

    def check_apart(self, scored: Iterable[str]) -> None:
        """Raise `UsageError` where this text, which calibrates, holds one of the long ones among `scored`, wherever
        lines are broken."""
        words = fold(" ".join(document.text for document in self.documents))
        folded = sorted({fold(each) for each in scored})
        shared = [each for each in folded if len(each) >= REPEAT_CHARACTERS and each in words]
        if shared:
            raise UsageError(
                f"{self.name} shares {len(shared)} paragraphs with the text that is scored, such as "
                f"{shared[0][:60]!r}; what calibrates must not score",
                hint="leave them out of one of both, or give no such text: a part of what --text names then calibrates",
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the documents' digests."""
        return hashlib.sha256("".join(doc.digest for doc in self.documents).encode()).hexdigest()

    def encode(self, tokenize: Encode, length: int, count: int, *, start: int | None = None) -> Passages:
        """Up to `count` sequences of exactly `length` tokens, second half scored as llama.cpp's perplexity tool does.

        `tokenize` must add no special tokens. `start` (a begin-of-text id) is put before every sequence, unscored,
        and counts towards `length`. Raises `UsageError` when the text does not fill one sequence.
        """
        body = length - (start is not None)
        if body < 2 or count < 1:
            raise UsageError(f"sequences of {length} tokens, {count} of them, cannot be scored", hint="use more tokens")
        ids, marks, bytes_per_token = self._tokens(tokenize, body * count)
        whole = min(count, len(ids) // body)
        if not whole:
            raise self._too_short(len(ids), body)
        first = () if start is None else (start,)
        rows = [range(i * body, (i + 1) * body) for i in range(whole)]
        sequences = tuple(first + tuple(ids[i] for i in row) for row in rows)
        padded = [(False,) * len(first) + tuple(marks[i] for i in row) for row in rows]
        masks = tuple(tuple(mark and i >= length // 2 for i, mark in enumerate(row)) for row in padded)
        if not any(map(any, masks)):
            raise UsageError(f"{self.name}: no assistant token lies in the second half of a {length}-token sequence",
                             hint="use longer assistant messages, or more of them")  # fmt: skip
        return Passages(sequences, masks, self.name, self.digest, bytes_per_token)

    def _tokens(self, encode: Encode, enough: int) -> tuple[list[int], list[bool], float]:
        """Token ids and score marks of whole documents until there are `enough`, and bytes per scorable token."""
        ids: list[int] = []
        marks: list[bool] = []
        size = 0
        for document in self.documents:
            for text, scored in document.pieces:
                found = encode(text)
                ids += found
                marks += [scored] * len(found)
                size += len(text.encode()) * scored
            if len(ids) >= enough:
                break
        return ids, marks, size / max(sum(marks), 1)

    def _too_short(self, found: int, length: int) -> UsageError:
        characters = len("".join(document.text for document in self.documents))
        per_token = characters / found if found else 4.0
        return UsageError(
            f"{self.name} is too short: its part for this purpose has {len(self.documents)} documents with {found} "
            f"tokens; one sequence needs {length}",
            hint=f"use a text of at least {_needed(length * per_token)} characters "
                 f"({CALIBRATION_SHARE:.0%} of the documents calibrate, the rest score)",
        )  # fmt: skip


def _needed(characters: float) -> str:
    """Characters of a whole text whose smaller part fills `characters`, generously: documents are assigned by hash."""
    return f"{round(2 * (characters + DOCUMENT_CHARACTERS) / CALIBRATION_SHARE, -3):,.0f}"


def _text(name: str, documents: Iterable[Document], default: bool = False) -> Text:
    unique = {document.digest: document for document in documents if document.text.strip()}
    if not unique:
        raise UsageError(f"{name} holds no text")
    return Text(name, tuple(unique.values()), default)


def default_text() -> Text:
    """The language reference that every Python carries (`pydoc_data.topics`): English prose with code.

    Its long topics contain the short ones, word for word: repeated paragraphs stay in the longest topic only. The
    text differs between minor versions of Python; the name and the digest say which.
    """
    from pydoc_data import topics

    whole = sorted(set(topics.topics.values()), key=lambda topic: (-len(topic), topic))
    seen: set[str] = set()
    kept = ("\n\n".join(_unrepeated(paragraphs(topic), seen)).strip() for topic in whole)
    documents = (Document(((topic + "\n\n", True),)) for topic in kept if len(topic) >= 200)
    version = ".".join(platform.python_version_tuple()[:2])
    return _text(f"pydoc_data.topics of Python {version}", documents, default=True)


def read_text(path: Path, render: Render) -> Text:
    """The text in `path`: chat when it ends in `.jsonl` (one {"messages": […]} a line), else plain.

    `render` turns messages into pieces, marking the assistant's. Raises `UsageError` naming the line at fault.
    """
    content = _content(path)
    if path.suffix == ".jsonl":
        # not splitlines(): U+2028 and friends may stand unescaped inside a JSON string
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        return _text(path.name, _conversations(path, lines, render))
    return _text(path.name, _blocks(_unrepeated(paragraphs(content), set())))


def whole_text(path: Path) -> Text:
    """The plain text in `path` as one document, what repeats in it included. Raises `UsageError` for no text."""
    return Text(path.name, (Document(((_content(path), True),)),))


def _content(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
                         hint="convert it, for example with iconv -t utf-8") from error  # fmt: skip
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{path} is empty", hint="give plain text, or chat JSONL")
    return content


def _conversations(path: Path, lines: Sequence[tuple[int, str]], render: Render) -> Iterator[Document]:
    for number, line in lines:
        pieces = tuple(render(messages := _messages(path, number, line)))
        if not any(scored for _, scored in pieces):
            raise UsageError(f"{path}, line {number}: no message of the assistant, so nothing to score")
        yield Document(pieces, tuple((str(each["role"]), each["content"]) for each in messages))


def _messages(path: Path, number: int, line: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(line)["messages"]
        if not messages or any(not isinstance(entry["content"], str) or not entry["role"] for entry in messages):
            raise ValueError("messages need a role and text content")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        expected = 'expected {"messages": [{"role", "content"}, …]}'
        raise UsageError(f"{path}, line {number}: {expected}, {error!r}") from error
    found: list[dict[str, Any]] = messages
    return found


def render_with(template: Callable[[list[dict[str, Any]], bool], str]) -> Render:
    """A `Render` from a chat template `(messages, add_generation_prompt) -> str`: the scored pieces are what the model
    itself would have to write, its turn-ending marker included, the role header not."""

    def render(messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        whole = template(messages, False)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not index:
                continue
            prompt = template(messages[:index], True)
            end = len(template(messages[: index + 1], False).rstrip())
            start = max(done, _common(prompt, whole))
            if start < end <= len(whole):
                pieces += [(whole[done:start], False), (whole[start:end], True)]
                done = end
        return [piece for piece in [*pieces, (whole[done:], False)] if piece[0]]

    return render


def _common(left: str, right: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def paragraphs(content: str) -> list[str]:
    """Blocks between blank lines, line ends unified."""
    return [block for block in re.split(r"\n(?:[ \t]*\n)+", content.replace("\r\n", "\n")) if block.strip()]


def paragraph_keys(content: str) -> set[str]:
    """What counts as the same paragraph: long ones, white space folded."""
    return {key for key in map(fold, paragraphs(content)) if len(key) >= REPEAT_CHARACTERS}


def fold(text: str) -> str:
    """`text` with its white space folded."""
    return " ".join(text.split())


def _unrepeated(blocks: Iterable[str], seen: set[str]) -> Iterator[str]:
    """`blocks` without the long ones in `seen`, to which they are added: no paragraph may calibrate and score."""
    for block in blocks:
        key = fold(block)
        if len(key) >= REPEAT_CHARACTERS and key in seen:
            continue
        seen.add(key)
        yield block


def _blocks(blocks: Iterable[str], least: int = DOCUMENT_CHARACTERS) -> Iterator[Document]:
    """Documents of whole paragraphs, each of at least `least` characters but the last."""
    held: list[str] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= least:
            yield Document((("\n\n".join(held) + "\n\n", True),))
            held = []
    if held:
        yield Document((("\n\n".join(held), True),))
