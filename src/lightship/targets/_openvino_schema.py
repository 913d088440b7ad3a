"""JSON schemas in a form that OpenVINO GenAI's grammar compiler reads as it is meant."""

from __future__ import annotations

import json
import re
from typing import Any

from lightship.errors import RequestError

# xgrammar 0.1.31, in OpenVINO GenAI 2026.4, writes U+00DF as \xdf and takes a hexadecimal digit behind it for one more:
# of `größe` it makes `grö\u0dfe`, of `°F` U+0B0F. Names of properties it puts into its grammar without escaping them.
# In a text with a least or greatest length it lets control characters through, which are no JSON, and no escape.
MISREAD = re.compile(r"[\u0080-\u00ff][0-9A-Fa-f]")
UNESCAPED = re.compile(r'["\\\x00-\x1f]')
CHARACTER = '([ !#-\\[\\]-\U0010ffff]|\\\\["\\\\/bfnrt])'  # of a text in JSON, as a regular expression
LENGTHS = {"minLength", "maxLength"}
OPERATORS = re.compile(r"[\\^$.*+?()\[\]{}|/]")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLE = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems", "contains",
          "propertyNames", "not", "if", "then", "else")  # fmt: skip


def mend(form: Any) -> Any:
    """A structural tag with every schema in it mended."""
    if isinstance(form, list):
        return [mend(each) for each in form]
    if not isinstance(form, dict):
        return form
    return {key: mended(value) if key == "json_schema" else mend(value) for key, value in form.items()}


def mended(schema: Any) -> Any:
    """`schema` with the names and constants that would be misread in another writing of the same JSON.

    Raises `RequestError` for an object or a list with such a text among the constants.
    """
    if not isinstance(schema, dict):
        return schema
    found = {key: _value(key, value) for key, value in schema.items()}
    constants = [found["const"]] if "const" in found else found.get("enum")
    if isinstance(constants, list) and any(_misread(each) for each in constants):
        return _constants(constants)
    if found.get("type") == "string" and not found.keys() & {"pattern", "format", "enum", "const"}:
        return _bounded(found)
    return found


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """A text whose length is bounded, as a regular expression, which is held to JSON."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if not schema.keys() & LENGTHS or type(least) is not int or (type(most) is not int and "maxLength" in schema):
        return schema
    rest = {key: value for key, value in schema.items() if key not in LENGTHS}
    return {**rest, "pattern": f"^{CHARACTER}{{{least},{most}}}$"}


def _value(key: str, value: Any) -> Any:
    if key in NAMED and isinstance(value, dict):
        return {_name(name) if key == "properties" else name: mended(each) for name, each in value.items()}
    if key == "required" and isinstance(value, list):
        return [_name(name) if isinstance(name, str) else name for name in value]
    if key in LISTS and isinstance(value, list):
        return [mended(each) for each in value]
    return mended(value) if key in SINGLE else value


def _misread(value: Any) -> bool:
    return bool(MISREAD.search(json.dumps(value, ensure_ascii=False)))


def _name(name: str) -> str:
    """The name of a property: its JSON in ASCII, escaped once more for the grammar it is put into."""
    if not (_misread(name) or UNESCAPED.search(name)):
        return name
    return json.dumps(json.dumps(name)[1:-1])[1:-1]


def _constants(values: list[Any]) -> dict[str, Any]:
    """One of `values`, texts as a regular expression, which is read rightly."""
    texts = [value for value in values if isinstance(value, str)]
    others = [value for value in values if not isinstance(value, str)]
    if any(_misread(value) for value in others):
        raise RequestError("the engine cannot hold an answer to this constant of a schema: a letter of Latin-1 stands "
                           "before a hexadecimal digit in an object or a list", None, "unsupported_value")  # fmt: skip
    written = (json.dumps(text, ensure_ascii=False)[1:-1] for text in texts)
    pattern = "|".join(OPERATORS.sub(r"\\\g<0>", text) for text in written)
    only: dict[str, Any] = {"type": "string", "pattern": f"^({pattern})$"}
    return {"anyOf": [only, {"enum": others}]} if others else only
