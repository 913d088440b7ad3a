"""Prompts to put on a load with: held-out English of a given length, or tasks that copy from their input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightship.calibration import default_text
from lightship.errors import UsageError
from lightship.template import load_template
from lightship.tokenizer import load_tokenizer

COPY = "Repeat the following text word for word, and write nothing else.\n\n"
ENOUGH = 200_000  # tokens to draw passages from
AGAIN = "\n\nThe same text again, word for word:\n\n"  # for a model without a chat template


def text_prompts(folder: Path, count: int, length: int, shared: float = 0.0, seed: int = 0) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens of the model in the runtime folder `folder`, from text that never
    calibrates. The first `shared` of each is the same; the rest begins at a place of its own."""
    tokens = _tokens(folder, ENOUGH)
    common = round(shared * length)
    starts = np.random.default_rng(seed).integers(0, len(tokens), count + 1)
    prefix = _window(tokens, int(starts[0]), common)
    return [prefix + _window(tokens, int(start), length - common) for start in starts[1:]]


def copy_prompts(folder: Path, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of at most `length` tokens that ask to repeat a passage. Raises `UsageError` when there is no
    room for one."""
    tokenizer, template = load_tokenizer(folder), load_template(folder)
    tokens = _tokens(folder, ENOUGH)

    def asked(passage: str) -> list[int]:
        if template is None:
            return list(tokenizer.encode(passage + AGAIN).ids)
        rendered = template.render([{"role": "user", "content": COPY + passage}])
        return list(tokenizer.encode(rendered, add_special_tokens=False).ids)

    found = []
    for start in np.random.default_rng(seed).integers(0, len(tokens), count):
        room = length - len(asked(""))
        while room > 0 and len(prompt := asked(tokenizer.decode(_window(tokens, int(start), room)))) > length:
            room -= max((len(prompt) - length), 1)  # text cut out and written anew may take other tokens
        if room <= 0:
            raise UsageError(f"{length} tokens leave no room for a passage to copy", hint="use a larger --in")
        found.append(prompt)
    return found


def _tokens(folder: Path, enough: int) -> list[int]:
    """Token ids of held-out documents, one after the other."""
    tokenizer = load_tokenizer(folder)
    ids: list[int] = []
    for document in default_text().split()[1].documents:
        ids += tokenizer.encode(document.text, add_special_tokens=False).ids
        if len(ids) >= enough:
            break
    return ids


def _window(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; after the last the first follows."""
    return [tokens[(start + offset) % len(tokens)] for offset in range(length)]
