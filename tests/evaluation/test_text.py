"""The guard between calibration and scoring."""

from __future__ import annotations

import pytest

from lightship.calibration import Document, Text, calibration_set
from lightship.errors import LightshipError
from lightship.evaluation.text import check_disjoint, scoring_set

TEXT = Text("t", tuple(Document(((f"document {i} " * 9, True),)) for i in range(50)))


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_scoring_and_calibration_sets_come_from_different_documents() -> None:
    calibration = bytes(t for row in calibration_set(TEXT, tokenize, 50, 99).sequences for t in row).decode()
    scoring = bytes(t for row in scoring_set(TEXT, tokenize, 50, 99).sequences for t in row).decode()
    numbers = [{int(word) for word in part.split()[1:-1] if word.isdigit()} for part in (calibration, scoring)]
    both = zip(numbers, (calibration, scoring), strict=True)
    whole = [{n for n in found if part.count(f"document {n} ") >= 3} for found, part in both]
    assert len(whole[0]) > 3 and len(whole[1]) > 20 and not whole[0] & whole[1]


def test_an_overlap_is_refused() -> None:
    calibration, scoring = TEXT.split()
    check_disjoint(calibration, scoring)
    with pytest.raises(LightshipError, match="1 documents of t"):
        check_disjoint(Text("t", (scoring.documents[3],)), scoring)
