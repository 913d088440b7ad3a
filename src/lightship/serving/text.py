"""Tokens to text while they arrive: no broken characters, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

BROKEN = "\ufffd"
UNFINISHED = 3  # tokens that may hold the beginning of one character: UTF-8 needs at most 4 bytes
WINDOW = 16  # tokens decoded again at most, however long nothing visible arrives


class TextStream:
    """Text of a growing token list. `push` returns what is certain; `finish` the rest. `stopped` tells that a stop
    string was met: it and what follows are left out. Every token is decoded a bounded number of times.

    `hidden` are the tokens that add nothing to the text; None stands for those that the tokenizer calls special."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), hidden: Collection[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._stops = tuple(stops)
        self._ids: list[int] = []  # from the start of the window that is decoded again
        self._read = 0  # how many of them are already text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the new text that can be shown."""
        self._ids.extend(tokens)
        return self._match(self._decode(complete=False))

    def finish(self) -> str:
        """What was held back, after the last token."""
        text = self._match(self._decode(complete=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, complete: bool) -> str:
        """Text of the tokens not yet read. Decoding starts a few tokens back, since some tokenizers join or space by
        context; a trailing broken character waits for the tokens that complete it."""
        end = len(self._ids)
        now = self._text(self._ids)
        if now.endswith(BROKEN) and not complete:
            if end - self._read <= UNFINISHED:
                return ""
            end, now = self._certain()
        before = self._text(self._ids[: self._read])
        if len(now) > len(before) or end > WINDOW:
            del self._ids[: self._read]
            self._read = end - self._read
        return now[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        if self._hidden is None:
            found: str = self._tokenizer.decode(ids)
        else:
            found = self._tokenizer.decode(
                [each for each in ids if each not in self._hidden], skip_special_tokens=False
            )
        return found

    def _certain(self) -> tuple[int, str]:
        """The longest part, 1 to `UNFINISHED` tokens shorter, that ends in a whole character. When there is none, the
        shortest: what has stayed broken for so many bytes is not UTF-8, and waiting does not mend it."""
        for back in range(1, UNFINISHED + 1):
            end = len(self._ids) - back
            text = self._text(self._ids[:end])
            if not text.endswith(BROKEN):
                break
        return end, text

    def _match(self, new: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else new
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
