"""Chat templates: the one place where Jinja runs, sandboxed, with what transformers' templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightship.errors import RequestError

LIMIT = 1_000_000  # characters a rendered prompt may have


class ChatTemplate:
    """A model's chat template, read from `chat_template.jinja` or `tokenizer_config.json` of a runtime folder."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
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
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    source = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        special[name] = token.get("content", "") if isinstance(token, dict) else (token or "")
    return ChatTemplate(source, special)
