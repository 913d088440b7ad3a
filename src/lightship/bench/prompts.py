"""What is asked: pieces of English prose that differ from their first word on, behind a prefix that all share."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightship.bench.client import Asked

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Manner:
    """How requests are put to this server: the model's name, whether as chat, and which optional fields it knows.
    `continuous`: ask for the usage with every chunk, so that tokens without a text are seen when they come."""

    model: str | None = None
    chat: bool = False
    ignore_eos: bool = True
    usage: bool = True
    continuous: bool = False

    def asked(self, number: int, content: Any, max_tokens: int | None, exact: bool, at: float | None = None) -> Asked:
        """One greedy, streamed request. `content`: a text, token ids, or, for chat, messages."""
        messages = isinstance(content, list) and bool(content) and isinstance(content[0], dict)
        body: dict[str, Any] = {"model": self.model} if self.model is not None else {}
        if messages or self.chat:
            body["messages"] = content if messages else [{"role": "user", "content": content}]
        else:
            body["prompt"] = content
        body |= {"temperature": 0, "stream": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if self.usage:
            body["stream_options"] = {"include_usage": True}
            if self.continuous:
                body["stream_options"]["continuous_usage_stats"] = True
        if self.ignore_eos and exact:
            body["ignore_eos"] = True
        path = CHAT if "messages" in body else COMPLETIONS
        return Asked(number, path, json.dumps(body).encode(), max_tokens, exact, at)


class Source(Protocol):
    """Where requests come from; `count` is None where there is no end of them."""

    @property
    def count(self) -> int | None: ...
    def asked(self, number: int, at: float | None = None) -> Asked: ...


@dataclass(frozen=True)
class Length:
    """Words per prompt so that it has about so many tokens: tokens = fixed + each · words."""

    each: float
    fixed: float = 0.0

    @classmethod
    def fitted(cls, few: tuple[int, int], many: tuple[int, int]) -> Length:
        """From two pairs (words, tokens) that a server counted, the second with more of both."""
        each = (many[1] - few[1]) / (many[0] - few[0])
        return cls(each, few[1] - each * few[0])

    def words(self, tokens: int) -> int:
        """The words of a prompt of about `tokens` tokens, at least 1."""
        return max(1, round((tokens - self.fixed) / self.each))


@dataclass(frozen=True)
class Prose:
    """Units of text to cut prompts from: words, or token ids of a tokenizer."""

    units: Sequence[Any]

    @classmethod
    def of_words(cls) -> Prose:
        """Words of the text that every Python carries."""
        return cls(_text().split())

    @classmethod
    def of_ids(cls, tokenizer: Path) -> Prose:
        """The same text as token ids of `tokenizer`, a `tokenizer.json` or a folder that holds one, a bundle for
        example. Raises `SourceError`."""
        from lightship.tokenizer import load_tokenizer

        folder = tokenizer.parent if tokenizer.name == "tokenizer.json" else tokenizer
        inside = sorted(folder.glob("*/tokenizer.json")) or sorted(folder.glob("targets/*/tokenizer.json"))
        if not (folder / "tokenizer.json").is_file() and inside:
            folder = inside[0].parent
        return cls(load_tokenizer(folder).encode(_text(), add_special_tokens=False).ids)

    def piece(self, length: int, chance: random.Random) -> list[Any]:
        """`length` units from a place drawn by chance; the first is drawn by itself, so that two pieces differ from it
        on and no prefix cache helps."""
        units = self.units
        start = chance.randrange(len(units))
        piece = [units[(start + place) % len(units)] for place in range(1, length)]
        return [chance.choice(units), *piece]


def _text() -> str:
    from pydoc_data import topics  # the language reference that every Python carries: English prose with code

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


@dataclass(frozen=True)
class Synthetic:
    """Prompts of one length, the same for the same seed and number. `prefix` and `length` are in units of `prose`,
    `outputs` in tokens; `exact`: as of `Asked`."""

    manner: Manner
    prose: Prose
    length: int
    outputs: int
    prefix: int = 0
    seed: int = 0
    count: int | None = None
    exact: bool = True
    _shared: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        chance = random.Random(f"{self.seed} prefix")  # noqa: S311 (prompts, not secrets)
        object.__setattr__(self, "_shared", self.prose.piece(self.prefix, chance) if self.prefix else [])

    def content(self, number: int) -> Any:
        """The prompt of request `number`."""
        chance = random.Random(f"{self.seed} {number}")  # noqa: S311 (prompts, not secrets)
        units = [*self._shared, *self.prose.piece(self.length, chance)]
        return units if isinstance(units[0], int) else " ".join(units)

    def asked(self, number: int, at: float | None = None) -> Asked:
        return self.manner.asked(number, self.content(number), self.outputs, self.exact, at)
