"""Golden cases: reading, judging, pairing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from lightship.errors import UsageError
from lightship.evaluation import golden
from lightship.evaluation.golden import Case, compare, contains, mcnemar, passes, read_cases, run


def case(kind: Any, expected: Any) -> Case:
    return Case("c", "p", kind, expected, 8, "cases.jsonl, line 4")


def write(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def test_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "g.jsonl",
        {"prompt": "Capital of France?", "expect": {"regex": "Paris"}},
        {"id": "x", "messages": [{"role": "user", "content": "hi"}], "expect": {"json": {"a": 1}}, "max_tokens": 5},
    )
    first, second = read_cases(path)
    assert (first.id, first.kind, first.max_tokens, first.prompt) == ("line-1", "regex", 64, "Capital of France?")
    assert (second.id, second.expected, second.max_tokens) == ("x", {"a": 1}, 5)
    asked: list[Any] = []
    assert run((first, second), lambda prompt, limit: asked.append((prompt, limit)) or "answer") == ["answer"] * 2
    assert asked == [("Capital of France?", 64), ([{"role": "user", "content": "hi"}], 5)]


FINE = {"prompt": "p", "expect": {"exact": "a"}}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"prompt": "p"}, "expect"),
        ({"prompt": "p", "expect": {"exact": "a", "regex": "a"}}, "exactly one"),
        ({"prompt": "p", "expect": {"like": "a"}}, "exactly one"),
        ({"prompt": "p", "messages": [], "expect": {"exact": "a"}}, "either"),
        ({"expect": {"exact": "a"}}, "either"),
        ({"messages": [{"role": "user"}], "expect": {"exact": "a"}}, "messages"),
        ({"prompt": "p", "expect": {"regex": "("}}, "not a regular expression"),
        ({"prompt": "p", "expect": {"regex": "a" * 1001}}, "1001 characters, at most 1000"),
        ({"prompt": "p", "expect": {"exact": 3}}, "must be text"),
        ({**FINE, "max_tokens": 0}, "max_tokens"),
        ({**FINE, "max_tokens": True}, "max_tokens"),
        ({**FINE, "tempreature": 0}, "unknown keys tempreature"),
        ([1], "expected an object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: Any, match: str) -> None:
    with pytest.raises(UsageError, match=f"line 2.*{match}"):
        read_cases(write(tmp_path / "g.jsonl", FINE, bad))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_cases(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="no golden case"):
        read_cases(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text("\n{oops")
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_cases(tmp_path / "broken.jsonl")
    twice = {**FINE, "id": "same"}
    with pytest.raises(UsageError, match=r"line 2.*used before.*line 1"):
        read_cases(write(tmp_path / "g.jsonl", twice, twice))


@pytest.mark.parametrize(
    ("kind", "expected", "answer", "passed"),
    [
        ("exact", "Paris", " Paris\n", True),
        ("exact", "Paris", "Paris.", False),
        ("regex", r"\bParis\b", "It is Paris, of course", True),
        ("regex", r"^Paris$", "It is Paris", False),
        ("regex", "é", "café 漢字", True),
        ("json", {"a": {"b": 1}}, '{"a": {"b": 1.0, "c": 2}, "d": 3}', True),
        ("json", {"a": 1}, '{"a": true}', False),
        ("json", {"a": [1, {"b": 2}]}, '{"a": [1, {"b": 2, "c": 3}]}', True),
        ("json", {"a": [1]}, '{"a": [1, 2]}', False),
        ("json", {"a": None}, "{}", False),
        ("json", {}, "here you are: {}", False),
        ("json", {}, "[" * 100_000, False),
    ],
)
def test_judging(kind: str, expected: Any, answer: str, passed: bool) -> None:
    assert passes(case(kind, expected), answer) is passed


def test_contains_is_not_symmetric() -> None:
    assert contains({"a": 1, "b": 2}, {"a": 1}) and not contains({"a": 1}, {"a": 1, "b": 2})


def test_a_catastrophic_regex_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "REGEX_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"line 4.*\(a\+\)\+\$"):
        passes(case("regex", "(a+)+$"), "a" * 60 + "!")
    assert time.monotonic() - began < 5


def test_pairs_and_metrics() -> None:
    cases = [case("exact", "y")] * 10
    result = compare(cases, ["y"] * 6 + ["n"] * 4, ["y"] * 3 + ["n"] * 3 + ["y"] + ["n"] * 3)
    assert (len(result.both), len(result.lost), len(result.gained)) == (3, 3, 1)
    rate, lost = result.metrics()
    assert (rate.value, rate.baseline, rate.n) == (0.4, 0.6, 10) and lost.value == 3
    differences = [0] * 3 + [-1] * 3 + [1] + [0] * 3
    mean = sum(differences) / 10
    assert rate.stderr == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in differences) / 10 / 10))


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(3, 1) == mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(2, 2) == 1.0
