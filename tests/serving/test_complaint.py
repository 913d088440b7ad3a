"""What a body must not hold before it is parsed, counted against slow, obvious readers."""

import json
import random
import time

import pytest

from lightship.serving import limits as limiting
from lightship.serving.limits import DEPTH, complaint, parts_of, too_deep


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(word):
    """Python's parser takes them, and a field of any kind would."""
    for text in (word, f'{{"a": [1, {word}]}}', f'{{"{word}": {word}}}', f'"\\\\" {word}'):
        assert complaint(text.encode()) is not None, text
    for text in (f'"{word}"', f'{{"a\\"{word}": "{word}\\\\"}}', f'"x{word}\\"{word}"'):
        assert complaint(text.encode()) is None, text


def test_parts_are_counted_outside_of_texts():
    assert parts_of(b'{"a:[{": [[], {"b": "::\\\\\\":"}], "c": 1}') == 2 + 2 + 3
    most = limiting.PARTS - 1
    assert complaint(b"[" + b"[]," * (most - 1) + b"[]]") is None
    assert complaint(b"[" + b"[]," * most + b"[]]") is not None


def slow_depth(text):
    """How deep a parser gets, character by character."""
    depth = deepest = 0
    inside = escaped = False
    for letter in text:
        if inside:
            inside = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            inside = True
        elif letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest


def test_depth_is_that_of_a_slow_obvious_reader(monkeypatch):
    monkeypatch.setattr(limiting, "BLOCK", 7)  # so that strings, escapes and nesting cross the blocks
    letters = random.Random(0)
    for _ in range(5000):
        text = json.dumps(["".join(letters.choices('[]{}"\\a', k=letters.randint(0, 9))) for _ in range(3)])
        text += "".join(letters.choices(["[", "{", "]", "}", '"[\\""', '"\\\\"', ","], k=letters.randint(0, 30)))
        deepest = slow_depth(text)
        monkeypatch.setattr(limiting, "DEPTH", deepest)
        assert not too_deep(text.encode()), text
        monkeypatch.setattr(limiting, "DEPTH", deepest - 1)
        assert too_deep(text.encode()), text


def test_the_deepest_that_is_taken():
    assert complaint(b"[" * DEPTH + b"]" * DEPTH) is None
    assert complaint(b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1)) is not None


@pytest.mark.parametrize(
    "body",
    [b"[" * 2**21, b"[]" * 2**20, b'"' * 2**21, b'"' + b'\\"' * 2**20, b'["],' * 2**19, b"\\" * 2**21, b"::" * 2**20],
)
def test_looking_at_2_mb_takes_no_time_whatever_they_are(body):
    started = time.process_time()
    complaint(body)
    assert time.process_time() - started < 0.5  # milliseconds, measured; a loop in Python takes longer than this
