"""Mistral 7B Instruct v0.3, Nemo: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, all calls in one list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightship.serving.tools import parser, tags

SPECIAL = ("[TOOL_CALLS]",)
COMMA = re.compile(r"\s*,?\s*")


class Parser(parser.Parser):
    """Reads the calls of the list, each as soon as it is whole; a list of one without brackets is read too."""

    TAG = "[TOOL_CALLS]"
    BETWEEN = re.compile(r"\s*\[?\s*")

    def _closing(self, final: bool) -> tuple[int, int | None] | None:
        start = parser.end_of(parser.SPACE, self._held, 0)
        following = parser.end_of(COMMA, self._held, 0)
        if following == len(self._held):
            return (0, None) if final else None
        if self._held[start] == "]":
            return start + 1, None
        return (0, following) if self._held[start] == "," and self._held[following] == "{" else (0, None)


def grammar(tools: Sequence[dict[str, Any]], *, forced: bool, parallel: bool) -> str:
    """See `Tools.grammar`."""
    calls = tags.calls(tools, '{{"name": "{name}", "arguments": ', "}}")
    whole = tags.tag("[TOOL_CALLS] [", tags.separated(calls, ", ", parallel), "]")
    return tags.text(whole if forced else tags.triggered(["[TOOL_CALLS]"], [whole], parallel=False))
