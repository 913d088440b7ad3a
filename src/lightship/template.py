"""Chat templates: the one place where Jinja runs, sandboxed, with what transformers' templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightship.checkpoint import TOOL_USE, read_json
from lightship.errors import RequestError, SourceError

LIMIT = 1_000_000  # characters a rendered prompt may have


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, with which transformers marks the assistant's words: kept as it is."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's chat template, read from `chat_template.jinja` or `tokenizer_config.json` of a runtime folder.

    `tool_use` is the template for chats with tools, where a model has one of its own for them.
    """

    def __init__(self, source: str, special: dict[str, str], tool_use: str | None = None) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self._tool_use = environment.from_string(tool_use) if tool_use else self._template
        self._special = special

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt for `messages`, the same text as transformers' `apply_chat_template` makes of them; `tools` are
        functions as OpenAI describes them. Raises `RequestError` when the template refuses them."""
        try:
            text = (self._template if tools is None else self._tool_use).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
        if len(text) > LIMIT:
            raise RequestError(f"the rendered prompt exceeds {LIMIT} characters", "messages")
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def load_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, None where it has none."""
    config = _configuration(folder)
    sources = _sources(folder, config)
    if "default" not in sources:
        return None
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        special[name] = token.get("content", "") if isinstance(token, dict) else (token or "")
    try:
        return ChatTemplate(sources["default"], special, sources.get("tool_use"))
    except TemplateError as error:
        raise SourceError(f"the chat template of {folder} is no valid Jinja: {error}") from error


def literals(folder: Path) -> list[str]:
    """The texts that stand in the chat templates of a folder, those within expressions too; each once, in order."""
    found: dict[str, None] = {}
    for name, source in _sources(folder, _configuration(folder)).items():
        try:
            parsed = _environment().parse(source)
        except TemplateError as error:
            raise SourceError(f"the chat template {name!r} of {folder} is no valid Jinja: {error}") from error
        found |= {node.data: None for node in parsed.find_all(nodes.TemplateData)}
        found |= {node.value: None for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return [text for text in found if text]


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name → source of the templates of a folder, those in files of their own first."""
    sources = _named(config.get("chat_template"))
    for name, file in (("default", "chat_template.jinja"), ("tool_use", TOOL_USE)):
        if (folder / file).is_file():
            sources[name] = (folder / file).read_text(encoding="utf-8")
    return sources


def _named(found: Any) -> dict[str, str]:
    """Name → source of the templates in a tokenizer's configuration: one, or a list of several with names."""
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    return {str(name): source for name, source in named.items() if isinstance(source, str)}
