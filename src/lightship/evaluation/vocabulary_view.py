"""An original seen through a cut vocabulary, so that the two can be compared.

Ids are those of the cut model; of the original's logits the columns of the kept tokens are left, so a softmax over them
is the original's distribution given that the next token is a kept one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.engine import EncoderEngine
from lightship.seq2seq import Seq2Seq

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Restricted:
    """A `BlockScorer` of the original; `kept[i]` is the original's id of token i (`Checkpoint.kept_tokens`). What
    `steps` and `greedy` need beside `blocks`, `scorer` must have."""

    scorer: Any
    kept: Ids

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """See `Scorer`."""
        return np.concatenate(list(self.blocks(ids, mask, ids.shape[1])), axis=1)

    def blocks(self, ids: Ids, mask: Ids, size: int) -> Iterator[Floats]:
        """See `BlockScorer`: each (batch, ≤ size, kept)."""
        for logits in self.scorer.blocks(self.kept[ids], mask, size):
            yield logits[..., self.kept]

    def steps(self, rows: Ids, first: int, count: int) -> Floats:
        """The logits (rows, count, kept) after each of `count` tokens read one by one after `first`."""
        found: Floats = self.scorer.steps(self.kept[rows], first, count)[..., self.kept]
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The greedy continuations of prompts of one length among the kept tokens, `new_tokens` long, computed as
        `blocks` computes. Each token is found by reading the whole row again."""
        return _continued(self, np.array([list(prompt) for prompt in prompts], np.int64), new_tokens, ())


@dataclass(frozen=True)
class RestrictedPair:
    """A `SourceScorer` of an original encoder-decoder; `about` is the cut one."""

    scorer: Any
    kept: Ids
    about: Seq2Seq

    def given(self, source: Ids, mask: Ids) -> Restricted:
        """See `SourceScorer`."""
        return Restricted(self.scorer.given(self.kept[source], mask), self.kept)

    def greedy(self, sources: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """What is written for each of `sources` in kept tokens, greedily, `new_tokens` long."""
        start = np.tile(np.array(self.about.start, np.int64), (len(sources), 1))
        return _continued(self.given(*self.about.padded(sources)), start, new_tokens, self.about.never)


@dataclass(frozen=True)
class RestrictedEngine:
    """An original encoder that is called with the ids of the cut one; what it gives has no vocabulary."""

    engine: EncoderEngine
    kept: Ids

    def run(self, ids: Ids, mask: Ids, types: Ids) -> Floats:
        """See `EncoderEngine`."""
        return self.engine.run(self.kept[ids], mask, types)

    def close(self) -> None:
        """Release the model."""
        self.engine.close()


def _continued(scorer: Restricted, rows: Ids, new_tokens: int, never: Sequence[int]) -> list[list[int]]:
    first = rows.shape[1]
    for _ in range(new_tokens):
        last = scorer.logits(rows, np.ones_like(rows))[:, -1]
        last[:, list(never)] = -np.inf
        rows = np.concatenate([rows, last.argmax(-1)[:, None]], axis=1)
    found: list[list[int]] = rows[:, first:].tolist()
    return found
