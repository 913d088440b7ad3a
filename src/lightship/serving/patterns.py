"""Regular expressions of JSON Schema to EBNF: what stands in a JSON string as itself, and nothing that is guessed.

Only patterns that can be read letter by letter without a choice (one-unambiguous ones, Brüggemann-Klein and Wood 1998)
are taken: xgrammar 0.1.31 merges wrongly what begins alike, and would let other texts pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

MOST_LENGTH, MOST_DEPTH, MOST_REPEATS = 500, 16, 1000
CLASSES = {"d": "0-9", "w": "a-zA-Z0-9_"}
SPANS = {"d": (("0", "9"),), "w": (("a", "z"), ("A", "Z"), ("0", "9"), ("_", "_"))}
UNSAFE = ('"', "\\", *map(chr, range(32)))  # would have to be escaped in JSON
SPECIAL = set("\\^$.|?*+()[]{}")
MISREAD = re.compile(r"[\u0080-\u00ff](?=[0-9A-Fa-f])")
Spans = Sequence[tuple[str, str]]  # ranges of characters, both ends included


class Untranslatable(ValueError):
    """A pattern, or a part of one, that is not translated; the message says which."""


def literal(text: str) -> str:
    """`text` as a literal of the grammar; in two where xgrammar would misread one: it writes U+00DF as `\\xdf`, and
    takes a hexadecimal digit behind it for a part of the number."""
    parts = MISREAD.sub(r'\g<0>" "', text.replace("\\", "\\\\").replace('"', '\\"'))
    return f'"{parts}"'


def translate(pattern: object) -> str:
    """The grammar of what `pattern` (ECMA 262) matches as a whole: groups, alternatives, classes, `\\d`, `\\w`, `.` and
    bounded or unbounded repetition. Raises `Untranslatable` for the rest: assertions, back-references, lazy repetition,
    characters that JSON escapes, and places where two continuations begin alike."""
    if not isinstance(pattern, str) or len(pattern) > MOST_LENGTH:
        raise Untranslatable(f"pattern must be a text of at most {MOST_LENGTH} characters")
    text = pattern.removeprefix("^")
    anchored = len(text) < len(pattern)
    if text.endswith("$") and not re.search(r"(?<!\\)(\\\\)*\\\$$", text):
        text, anchored = text[:-1], True
    reader = _Reader(text)
    found = reader.alternatives(0)
    if reader.at < len(text):
        raise Untranslatable("pattern has a ) too many")
    if reader.split and anchored:
        raise Untranslatable("pattern anchors one of several alternatives; put them into a group: ^(a|b)$")
    reader.check(found)
    return found.text


@dataclass(frozen=True)
class _Part:
    """A piece of grammar with what Glushkov's construction needs: whether it may be empty, and at which of the
    pattern's letters it may begin and end."""

    text: str
    nullable: bool
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.split = text, 0, False
        self._letters: list[Spans] = []
        self._follow: list[set[int]] = []

    def check(self, whole: _Part) -> None:
        """Raises `Untranslatable` where two letters that may come next have a character in common."""
        for nexts in (whole.first, *self._follow):
            if any(_meet(self._letters[one], self._letters[other]) for one, other in combinations(nexts, 2)):
                raise Untranslatable("pattern has two continuations that begin alike; write what they share once")

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise Untranslatable("pattern ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _letter(self, text: str, spans: Spans) -> _Part:
        self._letters.append(spans)
        self._follow.append(set())
        here = frozenset([len(self._letters) - 1])
        return _Part(text, False, here, here)

    def alternatives(self, depth: int) -> _Part:
        """a|b|c, up to the end or a closing bracket."""
        if depth > MOST_DEPTH:
            raise Untranslatable(f"pattern is nested deeper than {MOST_DEPTH}")
        if words := self._words():
            return self._sub(_factored(words), depth)
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            self.split = self.split or depth == 0
            found.append(self._sequence(depth))
        return _Part(
            " | ".join(part.text for part in found), any(part.nullable for part in found),
            frozenset().union(*(part.first for part in found)), frozenset().union(*(part.last for part in found)),
        )  # fmt: skip

    def _words(self) -> list[str]:
        """The alternatives that come, where they are plain words of which some begin alike; they are read then."""
        end = next((at for at in range(self.at, len(self.text)) if self.text[at] in SPECIAL - {"|"}), len(self.text))
        words = self.text[self.at : end].split("|")
        if self.text[end : end + 1] not in ("", ")") or len({word[:1] for word in words}) == len(words):
            return []
        self.split = self.split or end == len(self.text)
        self.at = end
        return words

    def _sub(self, text: str, depth: int) -> _Part:
        """The part for another text than the one that stands here."""
        outer, self.text, self.at = (self.text, self.at), text, 0
        found = self.alternatives(depth + 1)
        self.text, self.at = outer
        return found

    def _sequence(self, depth: int) -> _Part:
        whole = _Part("", True)
        while self._peek() not in ("", "|", ")"):
            part = self._repeated(self._atom(depth))
            self._connect(whole.last, part.first)
            whole = _Part(
                f"{whole.text} {part.text}".strip(), whole.nullable and part.nullable,
                whole.first | part.first if whole.nullable else whole.first,
                whole.last | part.last if part.nullable else part.last,
            )  # fmt: skip
        return whole if whole.text else _Part('""', True)

    def _connect(self, ends: Iterable[int], begins: Iterable[int]) -> None:
        for end in ends:
            self._follow[end].update(begins)

    def _atom(self, depth: int) -> _Part:
        letter = self._next()
        if letter == "(":
            return self._group(depth)
        if letter == "[":
            return self._class()
        if letter == ".":
            return self._letter(r'[^"\\\x00-\x1f]', _others([(unsafe, unsafe) for unsafe in UNSAFE]))
        if letter == "\\":
            name = self._next()
            if name in CLASSES:
                return self._letter(f"[{CLASSES[name]}]", SPANS[name])
            letter = _escaped(name)
        elif letter in SPECIAL:
            raise Untranslatable(f"pattern uses {letter} in a place where it is not supported")
        if letter in UNSAFE:
            raise Untranslatable("pattern asks for a character that JSON escapes")
        return self._letter(literal(letter), ((letter, letter),))

    def _group(self, depth: int) -> _Part:
        if self._peek() == "?":
            if not self.text.startswith("?:", self.at):
                raise Untranslatable("pattern uses a group with ?, of which only (?: is supported")
            self.at += 2
        found = self.alternatives(depth + 1)
        if self._peek() != ")":
            raise Untranslatable("pattern has a ( too many")
        self.at += 1
        return _Part(f"({found.text})", found.nullable, found.first, found.last)

    def _class(self) -> _Part:
        negated = self._peek() == "^"
        self.at += negated
        parts, spans = list[str](), list[tuple[str, str]]()
        while (letter := self._next()) != "]":
            if letter == "\\" and self._peek() in CLASSES:
                name = self._next()
                parts.append(CLASSES[name])
                spans += SPANS[name]
                continue
            first = last = _escaped(self._next()) if letter == "\\" else letter
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                letter = self._next()
                last = _escaped(self._next()) if letter == "\\" else letter
            if first > last or (not negated and any(first <= unsafe <= last for unsafe in UNSAFE)):
                raise Untranslatable("pattern has a range that is empty or holds characters which JSON escapes")
            parts.append(_in_class(first) if first == last else f"{_in_class(first)}-{_in_class(last)}")
            spans.append((first, last))
        text = "".join(sorted(parts, key=lambda part: "\x80" <= part[-1] <= "\xff"))  # what is misread stands last
        if not text or MISREAD.search(text):
            raise Untranslatable("pattern has an empty class, or one that the engine would misread")
        if not negated:
            return self._letter(f"[{text}]", spans)
        return self._letter(f'[^{text}"\\\\\\x00-\\x1f]', _others([*spans, *((each, each) for each in UNSAFE)]))

    def _repeated(self, part: _Part) -> _Part:
        sign = self._peek()
        if sign not in ("*", "+", "?", "{") or not sign:
            return part
        self.at += 1
        low, high, text = {"*": (0, None, sign), "+": (1, None, sign), "?": (0, 1, sign)}.get(sign) or self._counts()
        if self._peek() in ("?", "+", "*", "{") and self._peek():
            raise Untranslatable("pattern uses lazy, possessive or doubled repetition")
        if high != 1 and (low != high or part.nullable):
            self._connect(part.last, part.first)
        return _Part(part.text + text, part.nullable or not low, part.first, part.last)

    def _counts(self) -> tuple[int, int | None, str]:
        found = re.compile(r"(\d{1,4})(,(\d{1,4})?)?}", re.ASCII).match(self.text, self.at)
        low = int(found[1]) if found else 0
        high = low if found and not found[2] else int(found[3]) if found and found[3] else None
        if not found or max(low, high or 0) > MOST_REPEATS or (high is not None and high < max(low, 1)):
            raise Untranslatable(f"pattern has a repetition that is not {{m}}, {{m,}} or {{m,n}} up to {MOST_REPEATS}")
        self.at = found.end()
        return low, high, "{" + found[0]


def _escaped(name: str) -> str:
    if name.isalnum():
        raise Untranslatable("pattern uses an escape with a letter or digit other than \\d and \\w")
    return name


def _in_class(letter: str) -> str:
    return f"\\{letter}" if letter in "]\\^-" else letter


def _others(spans: Spans) -> Spans:
    """All characters that are in none of `spans`."""
    found, begin = [], 0
    for first, last in sorted(spans):
        if begin < ord(first):
            found.append((chr(begin), chr(ord(first) - 1)))
        begin = max(begin, ord(last) + 1)
    return [*found, (chr(begin), chr(0x10FFFF))] if begin <= 0x10FFFF else found


def _meet(one: Spans, other: Spans) -> bool:
    return any(first <= end and begin <= last for first, last in one for begin, end in other)


def _factored(words: Sequence[str]) -> str:
    """One of `words` as a pattern that writes what they share once."""
    heads: dict[str, list[str]] = {}
    for word in dict.fromkeys(words):
        heads.setdefault(word[:1], []).append(word[1:])
    found = [
        "" if not head else re.escape(head) + (f"(?:{_factored(rest)})" if len(rest) > 1 else re.escape(rest[0]))
        for head, rest in heads.items()
    ]
    return "|".join(found)
