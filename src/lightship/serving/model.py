"""What the API knows of a served model: its name, limits, tokenizer and chat template. No weights."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightship.errors import ContextTooLong, RequestError, UnsupportedError
from lightship.template import ChatTemplate, load_template


@dataclass(frozen=True)
class ServedModel:
    """A runtime folder as the API sees it. `context` in tokens, `digest` of the bundle."""

    name: str
    digest: str
    context: int
    vocabulary: int
    tokenizer: Tokenizer
    template: ChatTemplate | None
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def load(name: str, digest: str, folder: Path) -> ServedModel:
        """Read configuration, tokenizer and template of the runtime folder `folder`."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not (folder / "tokenizer.json").is_file():
            raise UnsupportedError(f"{folder} has no tokenizer.json, so it cannot serve text")
        context = config.get("max_position_embeddings") or config.get("n_positions") or 2048
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return ServedModel(name, digest, int(context), int(config["vocab_size"]), tokenizer, load_template(folder))

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The prompt of a chat. Raises `RequestError` when the model has no chat template."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        text = self.template.render(messages)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt of a completion; token ids are checked against the vocabulary."""
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer.encode(prompt).ids
            return ids
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            raise RequestError(f"token ids must lie in 0 … {self.vocabulary - 1}", "prompt", "invalid_token_id")
        return list(prompt)

    def room(self, tokens: Sequence[int], wanted: int | None, param: str) -> int:
        """How many tokens may be generated: `wanted`, or all that the context leaves. Nothing is ever cut off."""
        if not tokens:
            raise RequestError("the prompt is empty", param)
        left = self.context - len(tokens)
        if left < (wanted or 1):
            asked = f" and {wanted} to generate" if wanted else ""
            raise ContextTooLong(
                f"This model's maximum context length is {self.context} tokens; the prompt has {len(tokens)}{asked}.", param
            )
        return wanted or left
