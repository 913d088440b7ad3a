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

from lightship.checkpoint import read_json
from lightship.errors import RequestError, SourceError

LIMIT = 1_000_000  # characters a rendered prompt may have


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, with which transformers marks the assistant's words: kept as it is."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's chat template, read from `chat_template.jinja` or `tokenizer_config.json` of a runtime folder."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special = special

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`. Raises `RequestError` when the template refuses them."""
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special
            )
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error
        if len(text) > LIMIT:
            raise RequestError(f"the rendered prompt exceeds {LIMIT} characters", "messages")
        return text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def load_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, None where it has none."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    source = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        special[name] = token.get("content", "") if isinstance(token, dict) else (token or "")
    try:
        return ChatTemplate(source, special)
    except TemplateError as error:
        raise SourceError(f"the chat template of {folder} is no valid Jinja: {error}") from error
