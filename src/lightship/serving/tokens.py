"""Tokens as bytes: exactly what each adds to the text, and which of them a piece of text has shown."""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

Alternatives = tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


@dataclass(frozen=True)
class Token:
    """One token of an answer. `bytes` None: this kind of tokenizer has no bytes of a single token. `offset` counts the
    characters of the text before it; `logprob` is None for the first token of a scored text."""

    id: int
    bytes: bytes | None
    text: str
    offset: int
    logprob: float | None
    top: Alternatives | None = None


class TokenBytes:
    """The bytes of a tokenizer's tokens: byte-level vocabularies (GPT-2, Llama 3), and those of SentencePiece with
    spaces as `▁` and bytes as `<0xE2>`. Special tokens are no part of the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.to_str())["decoder"] or {}
        parts = {part["type"]: part for part in decoder.get("decoders", [decoder]) if "type" in part}
        self._level = "ByteLevel" in parts
        self._pieces = not self._level and ("ByteFallback" in parts or "Metaspace" in parts)
        space = parts.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        self._strips = space or parts.get("Strip", {}).get("start", 0) > 0  # the space before the first word
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)

    def of(self, token: int, first: bool = False, special: bool = False) -> bytes | None:
        """What `token` adds to the text, which it begins if `first`. `special` shows special tokens by their names."""
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None or (token in self._special and not special):
            return b""
        if token in self._special:
            return piece.encode()
        if self._level:
            return _level_bytes(piece)
        if not self._pieces:
            return None
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        text = piece.replace("▁", " ")
        return (text.removeprefix(" ") if first and self._strips else text).encode()

    def begins(self, token: int) -> bool:
        """Whether a token counts as part of the text, so that the next is not its first."""
        return token not in self._special

    def name(self, token: int) -> str:
        """A token alone as readable text."""
        raw = self.of(token, special=True)
        found: str = self._tokenizer.decode([token]) if raw is None else raw.decode("utf-8", "replace")
        return found


def _level_bytes(piece: str) -> bytes:
    """A token of a byte-level vocabulary; one with other characters was added and means itself."""
    try:
        return bytes(_BYTES[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _byte_letters() -> dict[str, int]:
    """Letter → byte, as GPT-2's vocabulary writes them: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTES = _byte_letters()


class Line:
    """The tokens of one text in order, each with its place in it."""

    def __init__(self, about: TokenBytes) -> None:
        self._about = about
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset, self._first = 0, True

    def add(
        self, token: int, logprob: float | None, top: Alternatives | None = None, special: bool = False,
        hidden: bool = False,
    ) -> Token:  # fmt: skip
        """The next token; `special` shows special tokens by name, `hidden` shows nothing of this one."""
        raw = b"" if hidden else self._about.of(token, self._first, special)
        made = Token(token, raw, self._about.name(token) if raw is None else raw.decode("utf-8", "replace"),
                     self._offset, logprob, top)  # fmt: skip
        self._first = self._first and not (self._about.begins(token) or (special and not hidden))
        self._offset += len(made.text) if raw is None else len(self._decoder.decode(raw))
        return made


class Shown:
    """Hands tokens out with the text that shows them: text may be held back for a stop string, or until a character is
    whole, and its tokens are with it. `hidden`: the tokens that add nothing to the text, as `TextStream` has it."""

    def __init__(self, about: TokenBytes, hidden: Collection[int] | None = None) -> None:
        self._line, self._hidden = Line(about), hidden
        self._waiting: deque[tuple[int, Token]] = deque()  # (bytes of the text up to its end, token)
        self._known = self._shown = 0

    def push(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Tokens arrived."""
        for number, logprob in zip(ids, logprobs, strict=True):
            shown = self._hidden is not None and number not in self._hidden
            token = self._line.add(number, logprob, special=shown)
            self._known += len(token.text.encode() if token.bytes is None else token.bytes)
            self._waiting.append((self._known, token))

    def take(self, text: str, ended: bool = False, cut: bool = False) -> tuple[Token, ...]:
        """The tokens that are shown once `text` follows what was shown before; `ended` gives all that are left. One
        that a stop string `cut` in two is given whole, those behind it are not."""
        self._shown += len(text.encode())
        found: list[Token] = []
        while self._waiting:
            end, token = self._waiting[0]
            begin = end - len(token.text.encode() if token.bytes is None else token.bytes)
            if not (end <= self._shown or (cut and begin < self._shown) or (ended and not cut)):
                break
            found.append(self._waiting.popleft()[1])
        return tuple(found)


def as_chat(token: Token) -> dict[str, Any]:
    """A token in the shape of chat completions."""
    raw = None if token.bytes is None else list(token.bytes)
    return {"token": token.text, "logprob": token.logprob, "bytes": raw, "top_logprobs": []}


def as_legacy(tokens: Sequence[Token], about: TokenBytes) -> dict[str, Any]:
    """Tokens in the shape of the older completions route; a token that is no whole character is `bytes:\\xe2\\x80`.
    The alternatives of a position always hold the token that came."""

    def name(token: Token) -> str:
        return label(token.id, token.bytes or about.of(token.id, special=True), about)

    def top(token: Token) -> dict[str, float] | None:
        if token.top is None or token.logprob is None:
            return None
        found = {name(token): token.logprob}
        for number, logprob in token.top:
            if number != token.id:
                other = label(number, about.of(number, special=True), about)
                found[f"token_id:{number}" if other in found else other] = logprob
        return found

    tops = [top(token) for token in tokens]
    return {
        "tokens": [name(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if any(found is not None for found in tops) else None,
        "text_offset": [token.offset for token in tokens],
    }


def label(number: int, raw: bytes | None, about: TokenBytes) -> str:
    """How the older route names a token."""
    if raw is None:
        return about.name(number)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
