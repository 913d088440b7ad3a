"""Tokens to text while they arrive: no broken characters, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

BROKEN = "\ufffd"


class TextStream:
    """Text of a growing token list. `push` returns what is certain; `finish` the rest. `stopped` tells that a stop
    string was met: it and what follows are left out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._from = 0  # start of the window that is decoded again
        self._read = 0  # tokens whose text was taken
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
        before = self._tokenizer.decode(self._ids[self._from : self._read])
        now = self._tokenizer.decode(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith(BROKEN) and not complete):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _match(self, new: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else new
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
