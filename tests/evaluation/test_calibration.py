"""What calibrates must never score, whatever the text looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightship.calibration import (
    Document,
    Text,
    default_text,
    paragraph_keys,
    read_text,
    render_with,
)
from lightship.errors import UsageError
from lightship.evaluation.text import scoring_set

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"]


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def template(messages: list[dict[str, Any]], prompt: bool) -> str:
    body = "".join(f"<|{one['role']}|>\n{one['content']}<|end|>\n" for one in messages)
    return body + ("<|assistant|>\n" if prompt else "")


def paragraph(index: int) -> str:
    body = " ".join(WORDS[(index * k) % 10] for k in range(1, 60))
    return f"Paragraph {index} says {body} and ends at {index}."


def keys(text: Text) -> set[str]:
    return set().union(*(paragraph_keys(document.text) for document in text.documents))


def test_default_text_shares_no_document_and_no_paragraph() -> None:
    calibration, scoring = default_text().split()
    assert not {d.digest for d in calibration.documents} & {d.digest for d in scoring.documents}
    assert len(keys(calibration)) > 100 and len(keys(scoring)) > 100
    assert not keys(calibration) & keys(scoring)


def test_default_topics_repeat_each_other_so_the_check_above_can_fail() -> None:
    from pydoc_data.topics import topics

    raw = Text("raw", tuple(Document(((topic, True),)) for topic in sorted(set(topics.values()))))
    calibration, scoring = raw.split()
    assert keys(calibration) & keys(scoring)


def test_default_text_fills_what_evaluation_asks_for() -> None:
    calibration, scoring = default_text().split()
    assert sum(len(d.text) for d in scoring.documents) > 100_000
    assert sum(len(d.text) for d in calibration.documents) > 30_000


def test_split_ignores_the_order_of_documents() -> None:
    documents = tuple(Document(((paragraph(i), True),)) for i in range(40))
    forward, backward = Text("t", documents).split(), Text("t", documents[::-1]).split()
    assert [part.digest for part in forward] == [part.digest for part in backward]
    assert forward[0].digest != forward[1].digest


def test_a_new_document_moves_no_other() -> None:
    documents = tuple(Document(((paragraph(i), True),)) for i in range(40))
    before, after = Text("t", documents[:30]).split(), Text("t", documents).split()
    assert set(before[0].documents) <= set(after[0].documents)
    assert set(before[1].documents) <= set(after[1].documents)


def test_user_text_repeats_are_dropped_before_the_split(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(paragraph(i % 30) for i in range(300)))
    text = read_text(path, render_with(template))
    calibration, scoring = text.split()
    assert not keys(calibration) & keys(scoring)
    assert len(keys(text)) == 30


def test_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    content = "\n\n".join(paragraph(i) for i in range(30))
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    one, two = (read_text(tmp_path / name, render_with(template)) for name in ("a.txt", "b.txt"))
    assert one.digest == two.digest


def test_sequences_are_exact_do_not_overlap_and_score_the_second_half() -> None:
    text = Text("t", tuple(Document(((paragraph(i) + "é\n\n", True),)) for i in range(40)))
    found = scoring_set(text, tokenize, 64, 5)
    joined = b"".join(document.text.encode() for document in text.split()[1].documents)
    assert bytes(token for row in found.sequences for token in row) == joined[: 64 * 5]
    assert found.masks == (((False,) * 32 + (True,) * 32),) * 5
    assert found.scored == 160 and found.bytes_per_token == 1.0
    assert found.digest == text.split()[1].digest != text.split()[0].encode(tokenize, 64, 5).digest


def test_begin_of_text_starts_every_sequence_unscored() -> None:
    text = Text("t", tuple(Document(((paragraph(i), True),)) for i in range(40)))
    found = scoring_set(text, tokenize, 64, 3, start=999)
    assert [row[0] for row in found.sequences] == [999] * 3
    assert {len(row) for row in found.sequences} == {64} == {len(mask) for mask in found.masks}
    assert 999 not in {token for row in found.sequences for token in row[1:]}


def test_bytes_per_token_counts_utf8() -> None:
    text = Text("t", tuple(Document((("é" * 100 + str(i), True),)) for i in range(20)))
    found = scoring_set(text, lambda part: [ord(c) for c in part], 50, 1)
    assert 1.9 < found.bytes_per_token < 2.0


def chat(path: Path, n: int) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"Answer {i}! " * 9},
                      {"role": "user", "content": "more"}, {"role": "assistant", "content": f"More of {i}."}]}
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_chat_scores_the_assistant_only(tmp_path: Path) -> None:
    text = read_text(chat(tmp_path / "c.jsonl", 40), render_with(template))
    pieces = next(d for d in text.documents if d.text.startswith("<|user|>\nQ7<")).pieces
    assert [piece for piece, scored in pieces if scored] == ["Answer 7! " * 9 + "<|end|>", "More of 7.<|end|>"]
    assert "".join(piece for piece, _ in pieces).count("<|assistant|>") == 2
    found = scoring_set(text, tokenize, 100, 4)
    pairs = [zip(row, mask, strict=True) for row, mask in zip(found.sequences, found.masks, strict=True)]
    scored = bytes(token for pair in pairs for token, mark in pair if mark)
    assert b"user" not in scored and b"assistant" not in scored and b"nswer" in scored
    assert not any(any(mask[:50]) for mask in found.masks)


def test_identical_conversations_count_once(tmp_path: Path) -> None:
    path = chat(tmp_path / "c.jsonl", 10)
    path.write_text(path.read_text() * 3)
    assert len(read_text(path, render_with(template)).documents) == 10


def test_unescaped_line_separator_in_json_is_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    entry = {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]}
    path.write_text(json.dumps(entry, ensure_ascii=False))
    assert len(read_text(path, render_with(template)).documents) == 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.txt", b"", "is empty"),
        ("t.txt", b" \n\n ", "is empty"),
        ("t.txt", b"caf\xe9", "not UTF-8.*byte 3"),
        ("c.jsonl", b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":""}]}\n{oops', "line 2"),
        ("c.jsonl", b'\n{"messages":[]}', "line 2"),
        ("c.jsonl", b'{"messages":[{"role":"user"}]}', "line 1"),
        ("c.jsonl", b'{"messages":[{"role":"user","content":"a"}]}', "line 1.*nothing to score"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=match):
        read_text(tmp_path / name, render_with(template))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_text(tmp_path / "no.txt", render_with(template))


def test_too_short_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Only this.")
    with pytest.raises(UsageError, match=r"one sequence needs 512[\s\S]*at least [\d,]+ characters"):
        scoring_set(read_text(tmp_path / "t.txt", render_with(template)), tokenize, 512, 2)
