"""The guard between calibration and scoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightship.calibration import Document, Text, read_text, render_with
from lightship.errors import SourceError, UsageError
from lightship.evaluation.text import scoring_set, tokeniser
from tests.tiny import tiny_llama

TEXT = Text("t", tuple(Document(((f"document {i} " * 9, True),)) for i in range(50)))


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_scoring_and_calibration_sets_come_from_different_documents() -> None:
    calibration = bytes(t for row in TEXT.split()[0].encode(tokenize, 50, 99).sequences for t in row).decode()
    scoring = bytes(t for row in scoring_set(TEXT, tokenize, 50, 99).sequences for t in row).decode()
    numbers = [{int(word) for word in part.split()[1:-1] if word.isdigit()} for part in (calibration, scoring)]
    both = zip(numbers, (calibration, scoring), strict=True)
    whole = [{n for n in found if part.count(f"document {n} ") >= 3} for found, part in both]
    assert len(whole[0]) > 3 and len(whole[1]) > 20 and not whole[0] & whole[1]


def test_a_conversation_that_grows_by_a_turn_is_on_one_side_only() -> None:
    """Unrolled chats: each line holds the one before it. Their digests differ, their answers repeat."""
    turns = [("question", False), ("a long answer that nobody gives twice by chance, number ", True)]
    talks = []
    for chat in range(40):
        pieces = [(text + str(chat) if scored else text, scored) for text, scored in turns]
        again = [("more", False), (f"and a second long answer in talk {chat}", True)]
        talks += [Document(tuple(pieces)), Document((*pieces, *again))]
    calibration, scoring = Text("t", tuple(talks)).split()
    sides = (calibration, scoring)
    answers = [{piece for document in side.documents for piece in document.answers()} for side in sides]
    assert len(answers[0]) > 3 and not answers[0] & answers[1]
    short = Text("t", tuple(Document((("why? " + str(i), False), ("Yes.", True))) for i in range(40))).split()
    assert all(side.documents for side in short)  # a stock phrase moves nothing


def test_a_template_that_writes_the_date_moves_no_conversation(tmp_path: Path) -> None:
    path, sides = tmp_path / "chat.jsonl", []
    words = "A long answer about {}, given once and to nobody else."
    asked = {"role": "user", "content": "What?"}
    chats = [[asked, {"role": "assistant", "content": words.format(n)}] for n in range(40)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    for day in ("Monday", "Tuesday"):

        def template(messages, prompt, day=day):
            said = "".join(f"<{each['role']}>{each['content']}</>" for each in messages)
            return f"Today is {day}. {said}{'<assistant>' * prompt}"

        calibration, scoring = read_text(path, render_with(template)).split()
        assert day in scoring.documents[0].text
        sides.append([{document.messages for document in side.documents} for side in (calibration, scoring)])
    assert sides[0] == sides[1] and sides[0][0]


def test_what_calibrates_holds_nothing_that_is_scored() -> None:
    """Wherever lines are broken, and whatever stands around it."""
    answer = "A long answer, given once and to nobody else in all of this text."
    chat = Document((("<user>", False), (f"{answer}<end>", True)), (("user", "Why?"), ("assistant", answer)))
    for text in (f"Before. {answer} And after.", answer.replace(" ", "\n\n"), f"x{answer}"):
        with pytest.raises(UsageError, match="shares 1 paragraphs"):
            Text("t", (Document(((text, True),)),)).check_apart(chat.answers())
    Text("t", (Document(((answer.replace("nobody", "somebody"), True),)),)).check_apart(chat.answers())
    Text("t", (Document((("Yes.", True),)),)).check_apart(["Yes."])  # a stock phrase gives nothing away


def test_a_token_without_an_embedding_is_an_error_of_the_source(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "llama", vocab_size=300)
    encode, _ = tokeniser(model)
    assert encode("a")
    with pytest.raises(SourceError, match=r"with id \d+, the model in .* embeddings for 0 … 299"):
        encode("the statement is executed")
