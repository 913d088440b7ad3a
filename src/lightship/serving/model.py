"""What the API knows of a served model: its name, limits, tokenizer and chat template. No weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightship.checkpoint import context_length
from lightship.engine import EngineSettings
from lightship.errors import ContextTooLong, RequestError, UnsupportedError
from lightship.serving.tokens import TokenBytes
from lightship.serving.tools import Tools, recorded
from lightship.template import ChatTemplate, load_template
from lightship.tokenizer import load_tokenizer

DEFAULT_MAX_TOKENS = 1024  # of an answer whose request sets no limit


@dataclass(frozen=True)
class ServedModel:
    """A runtime folder as the API sees it. `context` in tokens, `digest` of the bundle; `fingerprint` stands for the
    bundle and the settings of its engine. A chat without a limit gets at most `default_max_tokens`, or what the context
    leaves. `tools` says how it calls functions, None when it does not; `facts` go into /v1/models."""

    name: str
    digest: str
    context: int
    vocabulary: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    fingerprint: str = ""
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    tools: Tools | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def load(
        name: str,
        digest: str,
        folder: Path,
        settings: EngineSettings | None = None,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> ServedModel:
        """Read configuration, tokenizer and template of the runtime folder `folder`, opened with `settings`."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config.get("vocab_size"), int):
            raise UnsupportedError(f"{folder / 'config.json'} has no vocab_size")
        context = context_length(config) or 2048
        template = load_template(folder)
        return ServedModel(
            name, digest, context, config["vocab_size"], load_tokenizer(folder), template,
            fingerprint(digest, settings or EngineSettings()), default_max_tokens, recorded(template, folder),
        )  # fmt: skip

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of its tokens."""
        return TokenBytes(self.tokenizer)

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

    def added_tokens(self, prompt: str | Sequence[int]) -> list[bool]:
        """Which tokens of a completion's prompt the tokenizer added by itself, such as one that begins every text."""
        if isinstance(prompt, str):
            mask = self.tokenizer.encode(prompt, add_special_tokens=True).special_tokens_mask
            return [bool(mark) for mark in mask]
        return [False] * len(prompt)

    def question_tokens(self, question: str) -> list[int]:
        """The prompt for one question: as a chat where the model has a template, plain where it has none."""
        return (
            self.chat_tokens([{"role": "user", "content": question}]) if self.template else self.prompt_tokens(question)
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def room(self, tokens: Sequence[int], wanted: int | None, param: str) -> int:
        """How many tokens may be generated: `wanted`, or `default_max_tokens` as far as the context leaves them. No
        prompt is ever cut off."""
        if not tokens:
            raise RequestError("the prompt is empty", param)
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", param, "invalid_token_id")
        left = self.context - len(tokens)
        if left < (1 if wanted is None else wanted):
            asked = f" and {wanted} are to be generated" if wanted else ""
            raise ContextTooLong(
                f"This model's maximum context length is {self.context} tokens; the prompt has {len(tokens)}{asked}.",
                param,
            )
        return min(left, self.default_max_tokens) if wanted is None else wanted


def fingerprint(digest: str, settings: EngineSettings) -> str:
    """OpenAI's `system_fingerprint`: equal as long as the model and the settings of its engine are. `fp_` and the first
    12 hex digits of the SHA-256 of the bundle's digest and the settings as JSON."""
    stated = json.dumps({"bundle": digest, "settings": asdict(settings)}, sort_keys=True)
    return "fp_" + hashlib.sha256(stated.encode()).hexdigest()[:12]
