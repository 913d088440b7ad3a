"""Llama 3.1 to 3.3: `{"name": …, "parameters": {…}}` alone, or after `<|python_tag|>`; several with `;` between."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightship.serving.tools import parser, tags

SPECIAL = ("<|python_tag|>",)
KEYS = ('"name"', '"type"', '"parameters"', '"arguments"')  # with which the object of a call may begin
LONGEST = max(map(len, KEYS))
BETWEEN_CALLS = re.compile(r"[\s;,]*")


class Parser(parser.Parser):
    """Reads calls that stand at the beginning of a line; an object within a sentence is no call."""

    TAG = "<|python_tag|>"
    WITHOUT_ARGUMENTS = False  # nothing else tells a call from an answer in JSON

    def _opening(self, final: bool) -> tuple[int, int | None]:
        place = 0
        while True:
            brace = self._held.find("{", place)
            tag = self._held.find(self.TAG, place)
            if tag < 0 and brace < 0:
                return len(self._held) - (0 if final else parser.overlap(self._held, self.TAG)), None
            if brace < 0 or 0 <= tag < brace:
                begins, place = tag, tag + len(self.TAG)
                start = parser.end_of(parser.SPACE, self._held, place)
                likely = "{".startswith(self._held[start : start + 1])
            else:
                begins, start, place = brace, brace, brace + 1
                likely = self._begins_line(brace) and self._begins_call(brace)
            if likely and self._open(start):
                return (len(self._held) if final else begins), None
            if likely:
                return begins, start

    def _begins_line(self, place: int) -> bool:
        before = self._space + self._held[:place]
        line = before[before.rfind("\n") + 1 :]
        return not line.strip() and (len(line) < len(before) or not self._said)

    def _begins_call(self, brace: int) -> bool:
        """Whether what follows is the first key of a call, or may become it."""
        rest = self._first(brace)
        return any(rest.startswith(key) or key.startswith(rest) for key in KEYS)

    def _open(self, brace: int) -> bool:
        """Whether the text ends before the first key of the object at `brace`."""
        return brace == len(self._held) or any(
            key.startswith(self._first(brace)) and key != self._first(brace) for key in KEYS
        )

    def _first(self, brace: int) -> str:
        """What follows a brace, as far as the first key of a call may reach."""
        start = parser.end_of(parser.SPACE, self._held, brace + 1)
        return self._held[start : start + LONGEST]

    def _closing(self, final: bool) -> tuple[int, int | None] | None:
        start = parser.end_of(BETWEEN_CALLS, self._held, 0)
        if self._held.startswith(self.TAG, start):
            start = parser.end_of(parser.SPACE, self._held, start + len(self.TAG))
        elif start < len(self._held) and self.TAG.startswith(self._held[start:]):
            return (0, None) if final else None
        if start == len(self._held):
            return (0, None) if final else None
        return (0, start) if self._held[start] == "{" else (0, None)

    def _rejected(self, opening: str, text: str, whole: bool) -> int:
        return len(opening) + (len(text) if whole else 1)


def grammar(tools: Sequence[dict[str, Any]], *, forced: bool, parallel: bool) -> str:
    """See `Tools.grammar`."""
    calls = tags.calls(tools, '{{"name": "{name}", "parameters": ', "}}")
    if forced:
        return tags.text(tags.separated(calls, "; ", parallel))
    return tags.text(tags.triggered(['{"name": '], calls, parallel))
