"""Scores of what a client gives, as lm-eval's local-completions asks for them, against the same computed here."""

import math
import os
import signal

import httpx
import numpy as np
import openai
import pytest

from lightship.engine import EngineSettings
from lightship.find import find
from lightship.sampling import log_softmax
from lightship.serving.scoring import BLOCK, _likeliest
from lightship.serving.server import running
from lightship.tokenizer import load_tokenizer

TEXT = "The for statement is used to iterate — naïve, 漢字, <|end|> and\n\tmore of it"


@pytest.fixture(scope="module", params=["openvino", "onnx"])
def served(request, bundle_path):
    """(URL, target, runtime folder)."""
    path = bundle_path if request.param == "openvino" else request.getfixturevalue("onnx_path")
    with running(path) as url:
        yield url, request.param, path / "targets" / request.param


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_tokenizer(llama.folder)


def in_process(served, ids):
    """log p of every following token, and whether it is the likeliest."""
    scorer = find("targets", served[1]).open_scorer(served[2], EngineSettings())
    row = np.array([ids], np.int64)
    logprobs = log_softmax(scorer.logits(row, np.ones_like(row))[0, :-1])
    return logprobs[np.arange(len(ids) - 1), ids[1:]], logprobs.argmax(axis=1) == ids[1:]


def score(client, prompt, **options):
    return client.completions.create(
        model="tiny", prompt=prompt, echo=True, **{"max_tokens": 0, "logprobs": 1, "temperature": 0, **options}
    )


def test_as_lm_eval_asks(served, client, tokenizer):
    """Context and continuation as ids, one token generated and dropped: sum and greediness are those in process."""
    texts = ["Hello there, this is", "x" * 40 + TEXT]
    rows = [tokenizer.encode(text).ids for text in texts]
    answer = score(client, rows, max_tokens=1, seed=1234)
    for choice, ids in zip(answer.choices, rows, strict=True):
        context = 3
        given = choice.logprobs
        logprobs, tops = given.token_logprobs[context:-1], given.top_logprobs[context:-1]
        expected, greedy = in_process(served, ids)
        assert len(logprobs) == len(ids) - context
        assert sum(logprobs) == pytest.approx(expected[context - 1 :].sum(), abs=1e-4)
        assert np.abs(np.array(logprobs) - expected[context - 1 :]).max() < 1e-4
        found = [value == max(top.values()) for value, top in zip(logprobs, tops, strict=True)]
        assert found == list(greedy[context - 1 :])
    assert answer.usage.prompt_tokens == sum(map(len, rows)) and answer.usage.completion_tokens == 2


def test_scores_are_those_of_the_original(served, client, llama, tokenizer):
    import torch

    ids = tokenizer.encode(TEXT).ids
    with torch.no_grad():
        expected = torch.log_softmax(llama.load()(torch.tensor([ids])).logits[0, :-1].double(), -1)
    given = score(client, [ids], logprobs=5).choices[0].logprobs
    own = expected[range(len(ids) - 1), ids[1:]].numpy()
    assert np.abs(np.array(given.token_logprobs[1:]) - own).max() < 1e-3
    likeliest = expected.topk(5).values.numpy()
    for top, values, own_value in zip(given.top_logprobs[1:], likeliest, own, strict=True):
        assert 5 <= len(top) <= 6 and sorted(top.values())[-5:] == pytest.approx(sorted(values), abs=1e-3)
        assert min(abs(value - own_value) for value in top.values()) < 1e-3  # the one that came is among them


@pytest.mark.parametrize("most", [0, 7])
@pytest.mark.parametrize("as_ids", [False, True])
def test_nothing_is_missing_and_every_offset_is_exact(client, tokenizer, most, as_ids):
    ids = tokenizer.encode(TEXT).ids
    answer = score(client, [ids] if as_ids else TEXT, max_tokens=most, logprobs=0)
    choice, given = answer.choices[0], answer.choices[0].logprobs
    new = answer.usage.completion_tokens
    assert choice.text.startswith(TEXT) and (new > 0) == (most > 0) and choice.finish_reason in ("length", "stop")
    assert len(given.tokens) == len(given.token_logprobs) == len(given.text_offset) == len(ids) + new
    assert given.token_logprobs[0] is None and all(value <= 0 for value in given.token_logprobs[1:])
    assert given.top_logprobs is None
    for token, offset in zip(given.tokens, given.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token
    assert given.text_offset == sorted(given.text_offset)


def test_several_prompts_and_choices_streamed_and_not(client):
    options = {"max_tokens": 4, "n": 2, "temperature": 1.0, "seed": 1}
    whole = score(client, ["Hello there", "A"], **options).choices
    assert [choice.index for choice in whole] == [0, 1, 2, 3]
    assert all(choice.text.startswith(("Hello there", "A")[choice.index // 2]) for choice in whole)
    texts = [""] * 4
    for chunk in score(client, ["Hello there", "A"], **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts[0].startswith("Hello there") and texts[3].startswith("A")


def test_more_texts_than_an_engine_takes_together_are_scored(client, tokenizer):
    """One computes nothing else in it: ONNX Runtime has 8 places."""
    ids = tokenizer.encode(TEXT).ids
    answer = score(client, [ids[: 3 + each] for each in range(9)])
    assert [len(choice.logprobs.token_logprobs) for choice in answer.choices] == [3 + each for each in range(9)]


def test_echo_alone_needs_no_scores(client):
    answer = client.completions.create(model="tiny", prompt="Hello there", echo=True, max_tokens=5, temperature=0)
    bare = client.completions.create(model="tiny", prompt="Hello there", max_tokens=5, temperature=0)
    assert answer.choices[0].text == "Hello there" + bare.choices[0].text and answer.choices[0].logprobs is None


def test_the_whole_context_is_scored_and_no_more(client):
    ids = [5 + place % 300 for place in range(2048)]
    given = score(client, [ids]).choices[0].logprobs
    assert len(given.token_logprobs) == 2048 and all(map(math.isfinite, given.token_logprobs[1:]))
    for prompt, most in (([*ids, 5], 0), (ids, 1)):
        with pytest.raises(openai.BadRequestError, match="context length"):
            score(client, [prompt], max_tokens=most)


def test_blocks_join_without_a_seam(served, client):
    for length in (1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1):
        ids = [7 + place % 200 for place in range(length)]
        given = score(client, [ids]).choices[0].logprobs.token_logprobs
        assert given[0] is None and len(given) == length
        if length > 1:
            assert np.abs(np.array(given[1:]) - in_process(served, ids)[0]).max() < 1e-4


def test_a_process_that_is_lost_is_told_and_replaced(served, client):
    from tests.serving.test_api import children

    score(client, "Hello")
    before = children(b"lightship.serving.scoring")
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 0}
        httpx.post(f"{served[0]}/v1/completions", json=body, timeout=0.3)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert score(client, "Hello").choices[0].logprobs.token_logprobs[0] is None
    assert set(children(b"lightship.serving.scoring")) & set(before) == set()


def test_the_likeliest_with_ties():
    assert _likeliest(np.array([-1.0, -0.5, -0.5, -2.0, -0.5]), 2) == [(1, -0.5), (2, -0.5)]
    assert _likeliest(np.array([-1.0, -0.5]), 0) == []
