"""Structural tags, xgrammar's JSON for text of which parts are fixed and parts follow a grammar.

Source: xgrammar 0.1.31, docs/tutorials/structural_tag.md; OpenVINO GenAI takes the text that `text` makes as
`StructuredOutputConfig.structural_tags_config`. Schemas are translated by us, see `json_schema`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightship.errors import RequestError
from lightship.serving.json_schema import any_object, to_grammar

JSON = dict[str, Any]


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
        content = {"type": "grammar", "grammar": arguments_of(tool["function"])}
        found.append(tag(begin.format(name=tool["function"]["name"]), content, end.format()))
    return found


def arguments_of(function: JSON) -> str:
    """The grammar of a function's arguments, `{}` where it has no parameters.

    Raises `RequestError` for a schema that is not valid, and, of a function that is `strict`, for one with keywords
    that would not be enforced; others may then have any object, since nothing is promised of them.
    """
    schema = function.get("parameters") or {}
    if not schema.keys() - {"type", "properties", "required"} and not schema.get("properties"):
        schema = {"additionalProperties": False}
    try:
        return to_grammar({**({} if "$ref" in schema else {"type": "object"}), **schema}, "tools")
    except RequestError as error:
        if error.code != "unsupported_schema" or function.get("strict"):
            raise
        return any_object()


def separated(tags: Sequence[JSON], separator: str, parallel: bool) -> JSON:
    """One of `tags`, or with `parallel` as many as the model likes, `separator` between them."""
    return {"type": "tags_with_separator", "tags": list(tags), "separator": separator, "at_least_one": True,
            "stop_after_first": not parallel}  # fmt: skip


def triggered(triggers: Sequence[str], tags: Sequence[JSON], parallel: bool) -> JSON:
    """Any text; what begins with a trigger goes on as one of `tags`."""
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": list(tags), "at_least_one": False,
            "stop_after_first": not parallel}  # fmt: skip
