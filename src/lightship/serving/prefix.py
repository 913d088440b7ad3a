"""How prompts begin, as numbers: two that agree on a block and on all before it share what was computed of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

BLOCK = 64  # tokens


class Prefix:
    """The beginning of a prompt; nothing is computed before it is asked for."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """A hash for each whole block, of it and all before it. Where two hashes meet by chance, or by design, a
        request goes to an engine that does not know its prompt, and nothing else happens."""
        tokens = self._tokens
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        hashed = (hash(tuple(tokens[end - BLOCK : end])) for end in ends)
        return tuple(accumulate(hashed, lambda before, own: hash((before, own))))
