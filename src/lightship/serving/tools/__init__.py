"""Tool calls in chats: which family of templates a model's belongs to, and what its calls look like. One family a file.

A family is a module with `Parser`, `SPECIAL` (tokens that must be seen though the tokenizer may call them special) and
`grammar`. It is recognised by what it does: a call that the template writes must be read back by its parser.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

from lightship.checkpoint import read_json, write_json
from lightship.errors import RequestError
from lightship.serving.tools import hermes, llama3, mistral
from lightship.serving.tools.parser import Arguments, Parser, Start, Text, alphanumeric, call_id
from lightship.template import ChatTemplate

JSON = dict[str, Any]
FAMILIES: tuple[ModuleType, ...] = (hermes, mistral, llama3)  # the one without tags last
FILE = "tools.json"  # of a runtime folder
SHORT = 9  # letters and digits of an id, where a template takes no other


@dataclass(frozen=True)
class Tools:
    """How one model calls functions: its family, whether its template takes several calls in one message, and whether
    it takes ids of 9 letters or digits only."""

    family: str
    parallel: bool
    short_ids: bool

    def parser(self, names: Collection[str], *, parallel: bool = True, sure: bool = False) -> Parser:
        """A parser of one answer that may call the functions `names`. `sure`: it was forced by `grammar`."""
        found: Parser = _module(self.family).Parser(names, self.new_id, parallel=parallel and self.parallel, sure=sure)
        return found

    def grammar(self, tools: Sequence[JSON], forced: bool, parallel: bool = True) -> str:
        """The text of a grammar of the kind `tags` for `tools`, OpenAI's functions. With `forced` the answer is a call
        (with `parallel`: calls) and nothing else; without, any text in which each call is one of them. Either way the
        arguments follow the function's schema, see `tags.arguments_of`.

        The text is xgrammar's structural tag, `{"type": "structural_tag", "format": …}`.
        """
        found: str = _module(self.family).grammar(tools, forced=forced, parallel=parallel and self.parallel)
        return found

    def new_id(self) -> str:
        """A fresh id of a call."""
        return alphanumeric(SHORT) if self.short_ids else call_id()

    def hidden(self, tokenizer: Tokenizer, *, forced: bool) -> frozenset[int]:
        """The tokens that add nothing to the text that `parser` reads: special ones, but not those that mark a call. In
        a `forced` answer all count, since the grammar takes each for the text that it is called."""
        if forced:
            return frozenset()
        added = tokenizer.get_added_tokens_decoder().items()
        return frozenset(
            number for number, token in added if token.special and token.content not in _module(self.family).SPECIAL
        )

    def prepare(self, messages: Sequence[JSON]) -> list[JSON]:
        """`messages` as the template takes them: ids in its form, and the name of the function with each result.

        Raises `RequestError` for a result that answers no call before it.
        """
        names: dict[str, str] = {}
        found = []
        for index, message in enumerate(messages):
            if message["role"] == "tool":
                if message["tool_call_id"] not in names:
                    raise RequestError(
                        "a message of the role 'tool' must answer a tool call of a message before it",
                        f"messages.{index}.tool_call_id",
                    )
                message = {**message, "name": names[message["tool_call_id"]],
                           "tool_call_id": self._id(message["tool_call_id"])}  # fmt: skip
            elif "tool_calls" in message:
                names.update({call["id"]: call["function"]["name"] for call in message["tool_calls"]})
                message = {**message, "tool_calls": [{**call, "id": self._id(call["id"])}
                                                     for call in message["tool_calls"]]}  # fmt: skip
            found.append(message)
        return found

    def _id(self, given: str) -> str:
        """`given`, or, for a template that takes short ids only, 9 characters that stand for it."""
        if not self.short_ids or (len(given) == SHORT and given.isascii() and given.isalnum()):
            return given
        return hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:SHORT]


def _module(family: str) -> ModuleType:
    return next(each for each in FAMILIES if _name(each) == family)


def _name(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


# ── Which family ────────────────────────────────────────────────────────────

RESULT = "between sun and rain"
PROBES = (
    ("probe_weather", {"place": 'Zürich "See"\n', "days": 3, "more": {"list": [1, -2.5, True, None], "brace": "}]"}}),
    ("probe-time", {"zone": "}</tool_call>", "empty": {}}),
)
PROBE_TOOLS: list[JSON] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} is what this probe calls.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": f"the {key}"} for key in arguments},
                "required": list(arguments),
            },
        },
    }
    for name, arguments in PROBES
]


def detect(template: ChatTemplate) -> str | None:
    """The name of the family whose parser reads back the calls that `template` writes; None when none does."""
    found = recognise(template)
    return found.family if found else None


def recognise(template: ChatTemplate, families: Sequence[ModuleType] = FAMILIES) -> Tools | None:
    """The first of `families` that reads back what `template` writes, and what the template takes."""
    for family in families:
        for short_ids in (False, True):
            tools = Tools(_name(family), parallel=True, short_ids=short_ids)
            if _reads_back(template, tools, PROBES[:1]):
                return Tools(tools.family, _reads_back(template, tools, PROBES), short_ids)
    return None


def _reads_back(template: ChatTemplate, tools: Tools, calls: Sequence[tuple[str, JSON]]) -> bool:
    """Whether the template shows the functions and the result, and `tools` reads exactly `calls` from the answer in
    which it writes them."""
    question: list[JSON] = [{"role": "user", "content": "What is the weather like?"}]
    written = [{"id": tools.new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
               for name, arguments in calls]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in written]
    answer = {"role": "assistant", "content": "", "tool_calls": written}
    try:
        prompt = template.render(question, tools=PROBE_TOOLS)
        whole = template.render(
            tools.prepare([*question, answer, *results]), add_generation_prompt=False, tools=PROBE_TOOLS
        )
    except RequestError:
        return False
    shown = all(tool["function"]["name"] in prompt for tool in PROBE_TOOLS) and RESULT in whole
    cut = next((place for place, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    line = prompt.rfind("\n", 0, cut) + 1  # a prompt may go on with words that an answer need not begin with (<think>)
    return shown and any(_calls(tools, whole[start:]) == list(calls) for start in (cut, line))


def _calls(tools: Tools, text: str) -> list[tuple[str, JSON]]:
    """What is called in `text`; nothing when other words come first."""
    parser = tools.parser([name for name, _ in PROBES])
    deltas = [*parser.push(text), *parser.finish()]
    if deltas and isinstance(deltas[0], Text):
        return []
    names = [delta.name for delta in deltas if isinstance(delta, Start)]
    arguments = [delta.text for delta in deltas if isinstance(delta, Arguments)]
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


# ── What a runtime folder says ──────────────────────────────────────────────


def record(template: ChatTemplate | None, folder: Path) -> str | None:
    """Write the family of `template` into the runtime folder `folder`, when it belongs to one, and return its name."""
    family = detect(template) if template else None
    if family:
        write_json(folder / FILE, {"family": family})
    return family


def recorded(template: ChatTemplate | None, folder: Path) -> Tools | None:
    """How the model of a runtime folder calls functions, as `record` found it; None when it does not."""
    if template is None or not (folder / FILE).is_file():
        return None
    family = read_json(folder / FILE).get("family")
    return recognise(template, [each for each in FAMILIES if _name(each) == family])
