"""The scoring side of a text: documents that no calibration ever sees."""

from __future__ import annotations

from lightship.calibration import Encode, Passages, Text
from lightship.errors import LightshipError


def scoring_set(text: Text, tokenize: Encode, length: int, count: int, *, start: int | None = None) -> Passages:
    """Sequences to score on: from the documents that never calibrate. Raises `UsageError` for too short a text."""
    calibration, scoring = text.split()
    check_disjoint(calibration, scoring)
    return scoring.encode(tokenize, length, count, start=start)


def check_disjoint(calibration: Text, scoring: Text) -> None:
    """Raise `LightshipError` when a document would calibrate and score."""
    shared = {document.digest for document in calibration.documents} & {doc.digest for doc in scoring.documents}
    if shared:
        raise LightshipError(f"{len(shared)} documents of {scoring.name} would calibrate and score")
