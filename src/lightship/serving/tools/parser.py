"""Text that arrives in pieces, read into content and tool calls: what the parsers of all families share."""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

ALPHANUMERIC = string.ascii_letters + string.digits
BROKEN = 32  # after so many calls that cannot be read the rest is text: each is looked through once more
SPACE = re.compile(r"\s*")
MARKS = re.compile(r'\\.?|["{}\[\]]|[\x00-\x1f]', re.DOTALL)
HEAD = re.compile(r'\{\s*"name"\s*:\s*"([A-Za-z0-9_-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
ARGUMENTS = ("arguments", "parameters")  # the key that holds them, by family and by mood of the model


@dataclass(frozen=True)
class Text:
    """Content."""

    text: str


@dataclass(frozen=True)
class Start:
    """Call `index` begins, from 0 on: a function of the request, and an id of ours."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of the JSON object that call `index` passes on."""

    index: int
    text: str


Delta = Text | Start | Arguments


def call_id(length: int = 24) -> str:
    """An id as OpenAI gives them: `call_` and 24 letters or digits."""
    return "call_" + alphanumeric(length)


def alphanumeric(length: int) -> str:
    """Random letters and digits."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(length))


class Parser(ABC):
    """Reads one answer: `push` its text as it comes, then `finish`. Where the text is cut plays no role.

    A call is given when it is whole and names one of `names` with an object of arguments; what only looks like one is
    text, character by character. White space beside a call belongs to it. With `sure` the engine's grammar lets nothing
    else through, so arguments are passed on as they are written; they end too early where the answer does.
    Without `parallel` one call ends the answer: `done` says so, and what follows is not read.

    A family says where a call may begin and what follows it.
    """

    TAG: ClassVar[str]  # begins a call
    BETWEEN: ClassVar[re.Pattern[str]] = SPACE  # tag and object
    WITHOUT_ARGUMENTS: ClassVar[bool] = True  # whether a call may leave them out

    def __init__(
        self,
        names: Collection[str],
        new_id: Callable[[], str] = call_id,
        *,
        parallel: bool = True,
        sure: bool = False,
    ) -> None:
        self._names, self._new_id, self._parallel, self._sure = frozenset(names), new_id, parallel, sure
        self._held = ""  # text that is not read yet
        self._space = ""  # white space before it: content only when content follows
        self._said = False  # whether content was given since the last call
        self._calls = self._broken = 0
        self._state: Callable[[list[Delta], bool], bool] = self._content
        self._before, self._value, self._raw, self._json = "", Value(), "", ""  # of an object that may be a call
        self.done = False

    def push(self, text: str) -> list[Delta]:
        """Add text; return what is certain now."""
        self._held += text
        return self._advance(final=False)

    def finish(self) -> list[Delta]:
        """What was held back, after the last text."""
        found = self._advance(final=True)
        if self._space and not self.done and (self._said or not self._calls):
            found.append(Text(self._space))
        return found

    # ── What a family says ──────────────────────────────────────────────────

    def _opening(self, final: bool) -> tuple[int, int | None]:
        """How much of the held text is content for certain, and where behind it an object begins that may be a call."""
        place = self._held.find(self.TAG)
        if place < 0:
            return len(self._held) - (0 if final else overlap(self._held, self.TAG)), None
        behind = place + len(self.TAG)
        start = end_of(self.BETWEEN, self._held, behind)
        if start == len(self._held):
            return (start if final else place), None
        return (place, start) if self._held[start] == "{" else (behind, None)

    @abstractmethod
    def _closing(self, final: bool) -> tuple[int, int | None] | None:
        """After a call: how much of the held text closes it, and where behind that the next one begins at once; None
        as long as that is open."""

    def _rejected(self, opening: str, text: str, whole: bool) -> int:
        """How much of `opening` and `text`, the object after it, is content when that is no call; the rest is read
        again."""
        return len(self.TAG) if opening.startswith(self.TAG) else len(opening) + 1

    # ── States: each reads some of the held text, and says whether to go on ─

    def _advance(self, final: bool) -> list[Delta]:
        found: list[Delta] = []
        while not self.done and self._state(found, final):
            pass
        return found

    def _content(self, found: list[Delta], final: bool) -> bool:
        certain, start = self._opening(final)
        self._say(found, certain)
        if start is None:
            return certain > 0
        self._begin(start - certain)
        return True

    def _call(self, found: list[Delta], final: bool) -> bool:
        """Until the object is whole."""
        written, taken = self._value.read(self._held)
        self._raw, self._json, self._held = self._raw + self._held[:taken], self._json + written, self._held[taken:]
        if not self._value.ended:
            return final and self._reject(found)
        call = read_call(self._json, self._names, self.WITHOUT_ARGUMENTS)
        if call is None:
            return self._reject(found)
        self._start(found, call[0])
        found.append(Arguments(self._calls, call[1]))
        self._end_call()
        return True

    def _head(self, found: list[Delta], final: bool) -> bool:
        """Of a call whose form is sure: until its arguments begin."""
        head = HEAD.match(self._held)
        if head is None:
            return final and self._reject(found)
        if head[1] not in self._names:
            return self._reject(found)
        self._start(found, head[1])
        self._held, self._state = self._held[head.end() :], self._arguments
        return True

    def _arguments(self, found: list[Delta], final: bool) -> bool:
        written, taken = self._value.read(self._held)
        self._held = self._held[taken:]
        if written:
            found.append(Arguments(self._calls, written))
        if self._value.ended:
            self._state = self._brace
        return self._value.ended

    def _brace(self, found: list[Delta], final: bool) -> bool:
        """The end of the object around the arguments."""
        start = end_of(SPACE, self._held, 0)
        if start == len(self._held) and not final:
            return False
        self._held = self._held[start:].removeprefix("}")
        self._end_call()
        return True

    def _after(self, found: list[Delta], final: bool) -> bool:
        closing = self._closing(final)
        if closing is None:
            return False
        dropped, start = closing
        self._held = self._held[dropped:]
        if start is None:
            self._state = self._content
        else:
            self._begin(start)
        return True

    def _plain(self, found: list[Delta], final: bool) -> bool:
        self._say(found, len(self._held))
        return False

    # ── Steps between them ──────────────────────────────────────────────────

    def _say(self, found: list[Delta], size: int) -> None:
        """The first `size` characters are content; white space at their end waits for what follows."""
        text, self._held = self._space + self._held[:size], self._held[size:]
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            found.append(Text(shown))
            self._said = True

    def _begin(self, start: int) -> None:
        """An object that may be a call begins at `start`."""
        self._before, self._held = self._held[:start], self._held[start:]
        self._value, self._raw, self._json = Value(), "", ""
        self._state = self._head if self._sure else self._call

    def _reject(self, found: list[Delta]) -> bool:
        """It is none."""
        size = self._rejected(self._before, self._raw, self._value.ended)
        self._held = self._before + self._raw + self._held
        self._broken += 1
        self._state = self._content if self._broken < BROKEN else self._plain
        self._say(found, size)
        return True

    def _start(self, found: list[Delta], name: str) -> None:
        found.append(Start(self._calls, self._new_id(), name))

    def _end_call(self) -> None:
        self._calls += 1
        self._space, self._said, self._state = "", False, self._after
        self.done = not self._parallel


class Value:
    """The JSON object at the beginning of a text that arrives in pieces; `ended` once it is whole."""

    def __init__(self) -> None:
        self._depth, self._string = 0, False
        self.ended = False

    def read(self, text: str) -> tuple[str, int]:
        """The next part of the object, and how many characters of `text` that is. Control characters in strings, which
        models write and grammars let through though JSON does not, are escaped."""
        written, taken = "", 0
        for mark in MARKS.finditer(text):
            sign = mark[0]
            if sign == "\\":  # what it escapes has not arrived
                return written + text[taken : mark.start()], mark.start()
            if sign == '"':
                self._string = not self._string
            elif self._string:
                if sign < " ":
                    written += text[taken : mark.start()] + json.dumps(sign)[1:-1]
                    taken = mark.end()
            elif sign in "{}[]":
                self._depth += 1 if sign in "{[" else -1
                if self._depth == 0:
                    self.ended = True
                    return written + text[taken : mark.end()], mark.end()
        return written + text[taken:], len(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def read_call(text: str, names: Collection[str], without_arguments: bool) -> tuple[str, str] | None:
    """Name and arguments, as JSON text, of the call that the JSON object `text` describes; None when it is no call of a
    function in `names`."""
    found = members(text)
    if found is None:
        return None
    name: Any = json.loads(found.get("name", "null"))
    if not isinstance(name, str) or name not in names:
        return None
    arguments = next((found[key] for key in ARGUMENTS if key in found), None)
    if arguments in (None, "null") and without_arguments:
        arguments = "{}"
    if arguments is None or not arguments.startswith("{"):
        return None
    return name, arguments


def members(text: str) -> dict[str, str] | None:
    """Key → JSON text of its value, as it is written; None when `text` is no JSON object."""
    try:
        if not isinstance(_DECODER.decode(text), dict):
            return None
    except (ValueError, RecursionError):
        return None
    found = {}
    at = end_of(SPACE, text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = end_of(SPACE, text, text.index(":", at) + 1)
        _, end = _DECODER.raw_decode(text, at)
        found[key] = text[at:end]
        at = end_of(SPACE, text, end)
        if text[at] == ",":
            at = end_of(SPACE, text, at + 1)
    return found


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag` without being all of it."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the match of a pattern that always matches ends, from `at` on."""
    found = pattern.match(text, at)
    return found.end() if found else at
