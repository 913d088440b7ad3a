"""The token ids that a configuration names: read, and given new numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

NAMES_IDS = re.compile(r"(^|_)token_(ids?|index)$")  # eos_token_id, image_token_index, …: a number or a list of them
NEVER = ("suppress_tokens", "begin_suppress_tokens")  # what is not to be written: ids that are gone need no mention
NEVER_TOGETHER = "bad_words_ids"  # sequences of ids
PLACED = "forced_decoder_ids"  # [position, id] each
WEIGHED = "sequence_bias"  # [[id, …], weight] each


def named(config: Mapping[str, Any], vocabulary: int) -> set[int]:
    """The ids below `vocabulary` that `config` cannot do without; one outside, such as a padding of −1, is no token."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    _mapped(config, note, lambda token: False)
    return {token for token in found if 0 <= token < vocabulary}


def mapped(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """`config` with the ids in `new`, old → new; an id that stands for no token is left as it is."""
    return _mapped(config, lambda token: new.get(token, token), lambda token: token in new)


def _mapped(config: Mapping[Any, Any], change: Callable[[int], int], kept: Callable[[int], bool]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for name, value in config.items():
        if NAMES_IDS.search(str(name)):
            result[name] = _each(value, change)
        elif name in NEVER and isinstance(value, list):
            result[name] = [change(token) for token in value if kept(token)]
        elif name == NEVER_TOGETHER and isinstance(value, list):
            result[name] = [[change(token) for token in row] for row in value if all(map(kept, row))]
        elif name == PLACED and isinstance(value, list):
            result[name] = [[at, _each(token, change)] for at, token in value]
        elif name == WEIGHED and isinstance(value, list):
            result[name] = [[[change(token) for token in row], by] for row, by in value if all(map(kept, row))]
        elif isinstance(value, dict):
            result[name] = _mapped(value, change, kept)
        else:
            result[name] = value
    return result


def _each(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_each(each, change) for each in value]
    return change(value) if type(value) is int else value
