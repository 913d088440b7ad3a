"""What the API knows of a served model: its name, limits, tokenizer and chat template. No weights."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightship.checkpoint import context_length
from lightship.errors import ContextTooLong, RequestError, UnsupportedError
from lightship.serving.tools import Tools, recorded
from lightship.template import ChatTemplate, load_template
from lightship.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A runtime folder as the API sees it. `context` in tokens, `digest` of the bundle; `tools` says how it calls
    functions, None when it does not."""

    name: str
    digest: str
    context: int
    vocabulary: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    tools: Tools | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def load(name: str, digest: str, folder: Path) -> ServedModel:
        """Read configuration, tokenizer and template of the runtime folder `folder`."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config.get("vocab_size"), int):
            raise UnsupportedError(f"{folder / 'config.json'} has no vocab_size")
        context = context_length(config) or 2048
        template = load_template(folder)
        return ServedModel(
            name, digest, context, config["vocab_size"], load_tokenizer(folder), template, recorded(template, folder)
        )

    def chat_tokens(
        self, messages: Sequence[dict[str, Any]], functions: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """The prompt of a chat in which `functions` may be called. Raises `RequestError` when the model has no chat
        template, or one whose calls are not known and the chat has some."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        if self.tools is not None:
            messages = self.tools.prepare(messages)
        elif functions is not None or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            raise RequestError(
                f"{self.name!r} calls no functions: its chat template belongs to no family whose calls are read here",
                "tools" if functions is not None else "messages",
                "unsupported_parameter",
            )
        return self._encode(self.template.render(messages, tools=functions), special=False)

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt of a completion; token ids are checked against the vocabulary."""
        if isinstance(prompt, str):
            return self._encode(prompt, special=True)
        return list(prompt)

    def question_tokens(self, question: str) -> list[int]:
        """The prompt for one question: as a chat where the model has a template, plain where it has none."""
        return (
            self.chat_tokens([{"role": "user", "content": question}]) if self.template else self.prompt_tokens(question)
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def room(self, tokens: Sequence[int], wanted: int | None, param: str) -> int:
        """How many tokens may be generated: `wanted`, or all that the context leaves. Nothing is ever cut off."""
        if not tokens:
            raise RequestError("the prompt is empty", param)
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", param, "invalid_token_id")
        left = self.context - len(tokens)
        if left < (wanted or 1):
            asked = f" and {wanted} are to be generated" if wanted else ""
            raise ContextTooLong(
                f"This model's maximum context length is {self.context} tokens; the prompt has {len(tokens)}{asked}.",
                param,
            )
        return wanted or left
