"""One generation on its way from the engine to a client."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from lightship.engine import GenerationParams
from lightship.serving.model import ServedModel
from lightship.serving.supervisor import Supervisor
from lightship.serving.text import TextStream

JSON = dict[str, Any]


@dataclass
class Answer:
    """One generation on its way: pieces of text, then how it ended and what it used."""

    engine: Supervisor
    model: ServedModel
    tokens: list[int]
    params: GenerationParams
    stops: list[str]
    finish: str = "stop"
    produced: int = 0
    started: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Text as it becomes certain. Closing this early cancels the request in the engine."""
        text = TextStream(self.model.tokenizer, self.stops)
        events = self.engine.generate(self.tokens, self.params)
        try:
            async for event in events:
                self.produced += len(event.token_ids)
                yield text.push(event.token_ids)
                if text.stopped:
                    return
                self.finish = event.finish_reason or self.finish
            if rest := text.finish():
                yield rest
            if text.stopped:
                self.finish = "stop"
        finally:
            await events.aclose()

    def usage(self) -> JSON:
        """Token counts; the end-of-text token is not counted."""
        return {
            "prompt_tokens": len(self.tokens),
            "completion_tokens": self.produced,
            "total_tokens": len(self.tokens) + self.produced,
        }
