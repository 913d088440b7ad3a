"""Hermes, Qwen 2.5, Qwen 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightship.serving.tools import parser, tags

SPECIAL = ("<tool_call>", "</tool_call>")
CLOSE = "</tool_call>"


class Parser(parser.Parser):
    """Reads calls in their tags. A call counts once its object is whole: models forget to close the tag."""

    TAG = "<tool_call>"

    def _closing(self, final: bool) -> tuple[int, int | None] | None:
        start = parser.end_of(parser.SPACE, self._held, 0)
        if self._held.startswith(CLOSE, start):
            return start + len(CLOSE), None
        if CLOSE.startswith(self._held[start:]):  # it may still come, or was cut off
            return (len(self._held), None) if final else None
        return 0, None


def grammar(tools: Sequence[dict[str, Any]], *, forced: bool, parallel: bool) -> str:
    """See `Tools.grammar`."""
    calls = tags.calls(tools, '<tool_call>\n{{"name": "{name}", "arguments": ', "}}\n</tool_call>")
    if forced:
        return tags.text(tags.separated(calls, "\n", parallel))
    return tags.text(tags.triggered(["<tool_call>"], calls, parallel))
