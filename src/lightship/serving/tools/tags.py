"""Structural tags, xgrammar's JSON for text of which parts are fixed and parts follow a JSON schema.

Source: xgrammar 0.1.31, docs/tutorials/structural_tag.md; OpenVINO GenAI takes the text that `text` makes as
`StructuredOutputConfig.structural_tags_config`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

JSON = dict[str, Any]
NO_PARAMETERS: JSON = {"properties": {}, "additionalProperties": False}


def text(form: JSON) -> str:
    """The text of a grammar of the kind `tags`."""
    return json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)


def tag(begin: str, content: JSON, end: str) -> JSON:
    """`begin`, content, `end`."""
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def calls(tools: Sequence[JSON], begin: str, end: str) -> list[JSON]:
    """One tag for each tool, an OpenAI function: its arguments between the format strings `begin` and `end`, which may
    hold `{name}`."""
    found = []
    for tool in tools:
        function = tool["function"]
        parameters = {"type": "object", **(function.get("parameters") or NO_PARAMETERS)}
        schema = {"type": "json_schema", "json_schema": parameters}
        found.append(tag(begin.format(name=function["name"]), schema, end.format()))
    return found


def separated(tags: Sequence[JSON], separator: str, parallel: bool) -> JSON:
    """One of `tags`, or with `parallel` as many as the model likes, `separator` between them."""
    return {"type": "tags_with_separator", "tags": list(tags), "separator": separator, "at_least_one": True,
            "stop_after_first": not parallel}  # fmt: skip


def triggered(triggers: Sequence[str], tags: Sequence[JSON], parallel: bool) -> JSON:
    """Any text; what begins with a trigger goes on as one of `tags`."""
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": list(tags), "at_least_one": False,
            "stop_after_first": not parallel}  # fmt: skip
