"""Which tokens of the original a cut vocabulary kept, in `vocabulary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FILE = "vocabulary.json"
VERSION = 1


@dataclass(frozen=True)
class Kept:
    """`ids[i]` is the id that token i has in the original, whose vocabulary has `original` rows: ascending, so that the
    tokens keep their order."""

    original: int
    ids: npt.NDArray[np.int64]

    @staticmethod
    def read(value: Mapping[str, Any], path: Path, vocabulary: int) -> Kept:
        """What `path` (vocabulary.json) holds, checked against the `vocabulary` of the model. Raises `SourceError`
        saying what is wrong."""
        import numpy as np

        version, original, ids = value.get("version"), value.get("original"), value.get("kept")
        if version != VERSION:
            raise SourceError(f"{path} is of version {version!r}, expected {VERSION}")
        if type(original) is not int or not isinstance(ids, list) or any(type(each) is not int for each in ids):
            raise SourceError(f"{path} needs the size `original` and the list `kept` of whole numbers")
        if any(left >= right for left, right in zip([-1, *ids], [*ids, original], strict=True)):
            raise SourceError(f"{path}: `kept` must ascend from 0 or more to less than {original}")
        if len(ids) != vocabulary:
            raise SourceError(f"{path} keeps {len(ids)} tokens, config.json has a vocab_size of {vocabulary}")
        return Kept(original, np.array(ids, np.int64))

    def written(self) -> dict[str, Any]:
        """As `vocabulary.json` holds it."""
        return {"version": VERSION, "original": self.original, "kept": self.ids.tolist()}

    def cut(self, ids: npt.NDArray[np.int64]) -> Kept:
        """After another cut, which keeps of these tokens `ids`."""
        return Kept(self.original, self.ids[ids])
