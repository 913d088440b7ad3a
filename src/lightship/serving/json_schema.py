"""JSON Schema to a grammar (EBNF as xgrammar reads it) whose every sentence is valid JSON of the schema.

A keyword that the grammar would not enforce is refused by name. Where a schema leaves freedom the grammar may take less
of it: properties come in the order of the schema, an object that lists properties has no others, strings of a `pattern`
match it as a whole, numbers have at most 16 digits. Bytes that are no Unicode, which only a broken model writes, count
as one character and are shown as several. xgrammar's own translation of schemas (0.1, in OpenVINO GenAI
2026.4) is not used: for enums whose values begin alike, for ranges, lengths and patterns it lets invalid JSON pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from lightship.errors import RequestError
from lightship.serving.patterns import Untranslatable, literal, translate

JSON = dict[str, Any]
PARAM = "response_format"
MOST_BYTES, MOST_DEPTH, MOST_NODES, MOST_PROPERTIES, MOST_VALUES, MOST_COUNT = 64 * 2**10, 32, 2000, 500, 1000, 10_000
DIGITS = 16
LARGEST = 10**15  # bounds of numbers
ANNOTATIONS = frozenset(["title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly",
                         "writeOnly", "$defs", "definitions", "discriminator"])  # fmt: skip
CHOICES = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
BY_TYPE: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
}
BYTE = r"(0|1(\d\d?)?|2([0-4]\d?|5[0-5]?|[6-9])?|[3-9]\d?)"
FORMATS = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"({BYTE}\.){{3}}{BYTE}",
    "email": r"[a-zA-Z0-9_+\-]{1,32}(\.[a-zA-Z0-9_+\-]{1,32}){0,3}@[a-zA-Z0-9]{1,32}(\.[a-zA-Z0-9]{1,32}){1,3}",
}
FORMATS["date-time"] = FORMATS["date"] + "T" + FORMATS["time"]
# Space as llama.cpp's grammars allow it: enough for pretty-printed JSON, too little to write space for ever.
BASE = {
    "ws": r'"" | " " | "\n" [ \t]{0,20}',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" ([0-9a-cefA-CEF] hex hex hex | [dD] [0-7] hex hex))',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "fraction": '"." [0-9]{1,16}',
    "number": 'integer fraction? ([eE] [+\\-]? [0-9] [0-9]?)?',
    "pair": 'string ws ":" ws value',
    "object": '"{" ws (pair (ws "," ws pair)* ws)? "}"',
    "array": '"[" ws (value (ws "," ws value)* ws)? "]"',
    "value": 'object | array | string | number | "true" | "false" | "null"',
}  # fmt: skip


def any_object() -> str:
    """The grammar of any JSON object."""
    return _text({"root": "object", **BASE})


def to_grammar(schema: JSON, param: str = PARAM) -> str:
    """The grammar of `schema`. Raises `RequestError` naming `param` for a schema that is too large, not valid, or holds
    keywords that would not be enforced."""
    if len(json.dumps(schema)) > MOST_BYTES:
        raise RequestError(f"the schema exceeds {MOST_BYTES} bytes", param, "schema_too_large")
    try:
        return _Translation(schema, param).text()
    except RecursionError:
        raise RequestError("the schema's values are too much alike", param, "schema_too_large") from None


def _text(rules: Mapping[str, str]) -> str:
    return "".join(f"{name} ::= {body}\n" for name, body in rules.items())


class _Translation:
    def __init__(self, root: JSON, param: str) -> None:
        self._root, self._param = root, param
        self._rules: dict[str, str] = {"root": ""}
        self._known: dict[str, str] = {}  # body → rule
        self._references: dict[str, str] = {}
        self._opening: set[str] = set()  # references that are followed, with nothing written between
        self._left = {"subschemas": MOST_NODES, "properties": MOST_PROPERTIES, "enum values": MOST_VALUES}

    def text(self) -> str:
        """The whole grammar."""
        self._rules["root"] = self._reference("#")
        return _text({**self._rules, **BASE})

    def _refuse(self, message: str, code: str = "invalid_schema") -> NoReturn:
        raise RequestError(f"the schema cannot be used: {message}"[:300], self._param, code)

    def _unsupported(self, message: str) -> NoReturn:
        self._refuse(message, "unsupported_schema")

    def _spend(self, what: str, count: int = 1) -> None:
        self._left[what] -= count
        if self._left[what] < 0:
            self._refuse(f"it has too many {what}", "schema_too_large")

    def _rule(self, body: str) -> str:
        """The rule with this body, one for all places; an empty one is a new rule whose body comes later."""
        name = self._known.get(body) or f"r{len(self._rules)}"
        self._rules[name] = body
        if body:
            self._known[body] = name
        return name

    # ── What a schema is ────────────────────────────────────────────────────

    def _any(self, schema: Any, depth: int) -> str:
        """The body for a subschema."""
        self._spend("subschemas")
        if depth > MOST_DEPTH:
            self._refuse(f"it is nested deeper than {MOST_DEPTH}", "schema_too_large")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            self._refuse("a subschema must be an object" if schema is not False else "false allows nothing")
        keys = set(schema) - ANNOTATIONS
        chosen = [key for key in CHOICES if key in keys]
        if chosen:
            return self._choice(schema, keys, chosen, depth)
        kinds = schema.get("type")
        if kinds is None:
            if keys:
                self._unsupported(f"{_shown(min(keys))} is not enforced without a type")
            return "value"
        return self._typed(schema, keys, [kinds] if isinstance(kinds, str) else kinds, depth)

    def _member(self, schema: Any, depth: int) -> str:
        """The rule of what stands within an object or a list."""
        around, self._opening = self._opening, set()
        found = self._rule(self._any(schema, depth + 1))
        self._opening = around
        return found

    def _choice(self, schema: JSON, keys: set[str], chosen: list[str], depth: int) -> str:
        key = chosen[0]
        beside = keys - {key} - ({"type"} if key in ("enum", "const") else set())
        if beside:
            self._unsupported(f"{_shown(min(beside))} is not enforced beside {key}")
        if key == "$ref":
            return self._reference(schema["$ref"])
        if key in ("const", "enum"):
            return _trie(self._fitting(schema))
        options = schema[key]
        if not isinstance(options, list) or not options:
            self._refuse(f"{key} must be a list")
        if key == "allOf" and len(options) > 1:
            self._unsupported("allOf of several is not enforced")
        if key == "oneOf" and not self._disjoint(options):
            self._unsupported("oneOf is enforced only where a type, or a required constant property, tells the options "
                              "apart; use anyOf")  # fmt: skip
        return self._one_of(options, depth)

    def _one_of(self, options: Sequence[Any], depth: int) -> str:
        """Any of `options`; constants among them are one choice, since they may begin alike."""
        values: list[Any] = []
        others: list[str] = []
        for option in options:
            keys = set(option) - ANNOTATIONS if isinstance(option, dict) else set()
            if keys and keys <= {"const", "enum", "type"} and len(keys & {"const", "enum"}) == 1:
                values += self._fitting(option)
            else:
                others.append(self._any(option, depth + 1))
        return _options([*([_trie(values)] if values else []), *others])

    def _typed(self, schema: JSON, keys: set[str], kinds: Any, depth: int) -> str:
        if not isinstance(kinds, list) or not kinds or not all(kind in BY_TYPE for kind in map(str, kinds)):
            self._refuse("type must be one of " + ", ".join(BY_TYPE))
        known = {key for kind in kinds for key in BY_TYPE[kind]} | {"type"}
        if keys - known:
            self._unsupported(f"{_shown(min(keys - known))} is not enforced for this type")
        writers: dict[str, Callable[[JSON, int], str]] = {
            "string": self._string, "integer": self._number, "number": self._number, "array": self._array,
            "object": self._object, "boolean": lambda *_: '"true" | "false"', "null": lambda *_: '"null"',
        }  # fmt: skip
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return _options([writers[kind]({**schema, "type": kind}, depth) for kind in kinds])

    def _reference(self, pointer: Any) -> str:
        if not isinstance(pointer, str) or not re.fullmatch(r"#|#/(\$defs|definitions)/[^/~%]{1,200}", pointer):
            self._unsupported("$ref may point to # and into #/$defs or #/definitions only")
        if pointer in self._opening:
            self._refuse("a $ref leads back to itself")
        if pointer not in self._references:
            target: Any = self._root
            for part in pointer.split("/")[1:]:
                target = target.get(part) if isinstance(target, dict) else None
            if target is None:
                self._refuse("a $ref points to nothing")
            name = self._references[pointer] = self._rule("")
            self._opening.add(pointer)
            self._rules[name] = self._any(target, 1)
            self._opening.discard(pointer)
        return self._references[pointer]

    def _disjoint(self, options: Sequence[Any]) -> bool:
        seen = [self._target(option) for option in options]
        kinds = [option.get("type") for option in seen]
        if all(isinstance(kind, str) for kind in kinds) and len(set(kinds)) == len(kinds):
            return not {"integer", "number"} <= set(kinds)
        if any(kind != "object" for kind in kinds):
            return False
        return any(self._tells_apart(name, seen) for name in seen[0].get("required", ()))

    def _tells_apart(self, name: str, options: Sequence[JSON]) -> bool:
        values = []
        for option in options:
            property_ = option.get("properties", {}).get(name)
            if name not in option.get("required", ()) or not isinstance(property_, dict):
                return False
            found = [property_["const"]] if "const" in property_ else property_.get("enum", [])
            values += [json.dumps(value) for value in found] or [""] * 2
        return len(set(values)) == len(values)

    def _target(self, option: Any) -> JSON:
        if isinstance(option, dict) and isinstance(option.get("$ref"), str):
            self._reference(option["$ref"])
            parts = option["$ref"].split("/")[1:]
            option = self._root[parts[0]][parts[1]] if parts else self._root
        return option if isinstance(option, dict) else {}

    # ── Values of each type ─────────────────────────────────────────────────

    def _fitting(self, schema: JSON) -> list[str]:
        """The values of `const` or `enum` as JSON, those of another type than the schema's left out."""
        values, kind = [schema["const"]] if "const" in schema else schema["enum"], schema.get("type")
        if not isinstance(values, list):
            self._refuse("enum must be a list")
        self._spend("enum values", len(values))
        kinds = [kind] if isinstance(kind, str) else list(BY_TYPE) if kind is None else kind
        if not isinstance(kinds, list):
            self._refuse("type must be a name or a list of names")
        fitting = [value for value in values if any(_is(value, each) for each in kinds)]
        if not fitting:
            self._refuse("enum has no value of its type")
        return [json.dumps(value, ensure_ascii=False) for value in fitting]

    def _count(self, schema: JSON, key: str, default: int | None) -> int | None:
        value = schema.get(key, default)
        if value is not None and (type(value) is not int or not 0 <= value <= MOST_COUNT):
            self._refuse(f"{key} must be a whole number, at most {MOST_COUNT}")
        return value

    def _repeat(self, schema: JSON, least: str, most: str) -> tuple[int, int | None]:
        low, high = self._count(schema, least, 0) or 0, self._count(schema, most, None)
        if high is not None and low > high:
            self._refuse(f"{least} is above {most}")
        return low, high

    def _string(self, schema: JSON, depth: int) -> str:
        given = [key for key in ("format", "pattern") if key in schema]
        lengths = [key for key in ("minLength", "maxLength") if key in schema]
        if len(given) + bool(lengths) > 1:
            self._unsupported(f"{(given + lengths)[1]} is not enforced beside {given[0]}")
        if not given and not lengths:
            return "string"
        if lengths:
            low, high = self._repeat(schema, "minLength", "maxLength")
            return rf'"\"" char{{{low},{"" if high is None else high}}} "\""'
        if given == ["format"] and schema["format"] not in FORMATS:
            self._unsupported("format is enforced for " + ", ".join(FORMATS))
        pattern = schema["pattern"] if given == ["pattern"] else FORMATS[schema["format"]]
        try:
            return rf'"\"" ({translate(pattern)}) "\""'
        except Untranslatable as error:
            self._unsupported(str(error))

    def _number(self, schema: JSON, depth: int) -> str:
        whole = schema["type"] == "integer"
        low, high = (self._bound(schema, key, whole) for key in ("minimum", "maximum"))
        if low is None and high is None:
            return "integer" if whole else "number"
        if (found := number_range(low, high, whole)) is None:
            self._refuse("no number lies within its bounds")
        return found

    def _bound(self, schema: JSON, key: str, whole: bool) -> int | None:
        """The inclusive bound of a number."""
        exclusive = "exclusive" + key.title()
        step = 1 if key == "minimum" else -1
        found = []
        for name, move in ((key, 0), (exclusive, step)):
            value = schema.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int or (move and not whole):
                self._unsupported(f"{name} is enforced for whole numbers" + (" of integers" if move else ""))
            if abs(value) > LARGEST:
                self._refuse(f"{name} is beyond {LARGEST}")
            found.append(value + move)
        return (max(found) if step == 1 else min(found)) if found else None

    def _array(self, schema: JSON, depth: int) -> str:
        low, high = self._repeat(schema, "minItems", "maxItems")
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            self._refuse("prefixItems must be a list")
        if high is not None and high < len(first):
            self._unsupported("maxItems below the number of prefixItems is not enforced")
        parts = [self._member(item, depth) for item in first]
        rest = schema.get("items", True)
        if rest is False or (high is not None and high == len(first)):
            if low > len(first):
                self._refuse("minItems is more than the items that are allowed")
            return '"[" ws ' + ' ws "," ws '.join(parts) + (" ws " if parts else "") + '"]"'
        item = self._member(rest, depth)
        low, high = max(low - len(first), 0), None if high is None else high - len(first)
        if parts:
            more = f' (ws "," ws {item}){{{low},{"" if high is None else high}}}'
            return '"[" ws ' + ' ws "," ws '.join(parts) + more + ' ws "]"'
        more = f'{item} (ws "," ws {item}){{{max(low - 1, 0)},{"" if high is None else high - 1}}} ws'
        return f'"[" ws {more} "]"' if low else f'"[" ws ({more})? "]"'

    def _object(self, schema: JSON, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            self._refuse("properties must be an object, and required a list")
        if not all(isinstance(name, str) and name in properties for name in required):
            self._unsupported("required is enforced for names that properties lists")
        self._spend("properties", len(properties))
        low, high = self._repeat(schema, "minProperties", "maxProperties")
        if properties:
            if low > len(required) or (high is not None and high < len(properties)):
                self._unsupported("minProperties and maxProperties are not enforced beside properties")
            return self._members(properties, set(required), depth)
        if low > 1:  # a name may come twice
            self._unsupported("minProperties above 1 is not enforced without properties")
        extra = schema.get("additionalProperties", True)
        if extra is False or high == 0:
            return '"{" ws "}"'
        pair = self._rule(f'string ws ":" ws {self._member(extra, depth)}')
        pairs = f'{pair} (ws "," ws {pair}){{0,{"" if high is None else high - 1}}} ws'
        return f'"{{" ws {pairs} "}}"' if low else f'"{{" ws ({pairs})? "}}"'

    def _members(self, properties: JSON, required: set[str], depth: int) -> str:
        """The members in order, optional ones left out or not: from the last to the first what may stand from it on
        (`here`), and what follows it (`then`)."""
        here, then, needed = "", '""', False
        for name, schema in reversed(properties.items()):
            value = self._member(schema, depth)
            key = literal(json.dumps(name, ensure_ascii=False))
            skipped = f" | {here}" if here and name not in required else ""
            here = self._rule(f'{key} ws ":" ws {value} ws {then}{skipped}')
            needed = needed or name in required
            then = self._rule(f'"," ws {here}' + ("" if needed else ' | ""'))
        return f'"{{" ws {here} "}}"' if needed else f'"{{" ws ({here})? "}}"'


def _shown(key: str) -> str:
    """A keyword of the schema; an unknown one is the client's own text and is not sent back."""
    known = {
        "not",
        "if",
        "then",
        "else",
        "patternProperties",
        "propertyNames",
        "uniqueItems",
        "contains",
        "multipleOf",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "$id",
        "$anchor",
        "unevaluatedProperties",
        *BY_TYPE,
        *(key for keys in BY_TYPE.values() for key in keys),
        *CHOICES,
        "type",
    }
    return key if key in known else "an unknown keyword"


def _is(value: Any, kind: Any) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value % 1 == 0))
    types = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, types.get(str(kind), ()))


def _options(bodies: Sequence[str]) -> str:
    return bodies[0] if len(bodies) == 1 else " | ".join(f"({body})" for body in bodies)


def _trie(words: Sequence[str]) -> str:
    """One of `words`, each letter chosen once: alternatives that begin alike are merged wrongly by xgrammar."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(root)


def _branches(node: dict[str, Any]) -> str:
    found = []
    for letter, below in node.items():
        if not letter:
            found.append('""')
            continue
        word = letter
        while len(below) == 1 and "" not in below:
            ((letter, below),) = below.items()
            word += letter
        found.append(literal(word) + ("" if list(below) == [""] else f" ({_branches(below)})"))
    return " | ".join(found)


def number_range(low: int | None, high: int | None, whole: bool) -> str | None:
    """Numbers of `low` … `high`, with at most `DIGITS` digits before the point; None when there is none."""
    most = 10**DIGITS - 1
    low, high = -most if low is None else low, most if high is None else high
    if low > high:
        return None
    found = []
    if high >= 0:
        found.append(_digits(max(low, 0), high, whole))
    if low < 0:
        found.append('"-" (' + _digits(max(-high, 0 if not whole else 1), -low, whole) + ")")
    return _options(found)


def _digits(low: int, high: int, whole: bool) -> str:
    """The decimal numbers of 0 ≤ `low` … `high`, digit by digit, so that every alternative begins differently."""
    most = len(str(high))
    known: dict[object, str] = {}
    fraction = "" if whole else " fraction?"

    def after(prefix: int, length: int) -> str:
        """What may follow the digits of `prefix`."""
        room = most - length
        spans = [(prefix * 10**more, prefix * 10**more + 10**more - 1) for more in range(room + 1)]
        inside = tuple(low <= begin and end <= high for begin, end in spans)
        touched = tuple(begin <= high and end >= low for begin, end in spans)
        edge = not whole and any(begin <= high <= end for begin, end in spans)
        key = (length, inside) if inside == touched and not edge else prefix
        if key not in known:
            ends = [f'""{"" if prefix == high else fraction}'] if low <= prefix <= high else []
            known[key] = "(" + " | ".join(digits(prefix, length) + ends) + ")"
        return known[key]

    def digits(prefix: int, length: int) -> list[str]:
        """The next digit and what follows it; digits with the same continuation are one class."""
        bodies: dict[str, str] = {}
        for digit in range(10):
            number, room = prefix * 10 + digit, (most - length - 1) if prefix or digit else 0
            if (prefix or not length) and room >= 0 and _reaches(number, room, low, high):
                body = after(number, length + 1) if number else f'(""{"" if high == 0 else fraction})'
                bodies[body] = bodies.get(body, "") + str(digit)
        return [f"[{found}] {body}" for body, found in bodies.items()]

    return " | ".join(digits(0, 0))


def _reaches(prefix: int, room: int, low: int, high: int) -> bool:
    """Whether `prefix` with up to `room` more digits may lie in `low` … `high`."""
    return any(prefix * 10**more <= high and prefix * 10**more + 10**more - 1 >= low for more in range(room + 1))
