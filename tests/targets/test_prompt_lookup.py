"""Prompt lookup proposes what the text said before; the answer must stay token for token what it is without."""

from dataclasses import replace

import numpy as np
import pytest

from lightship.decoder_pipeline import EXACT
from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import RequestError, UnsupportedError
from lightship.targets import onnx, openvino
from tests.targets.proposing import ASKED, answers, check_same, check_stops, circling, rows

LOOKUP = replace(EXACT, prompt_lookup=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return circling(tmp_path_factory.mktemp("circles"))


@pytest.fixture(scope="module")
def pair(folder):
    """Without and with lookup."""
    opened = openvino.open(folder, EXACT), openvino.open(folder, LOOKUP)
    yield opened
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("asked", ASKED)
def test_the_answer_is_the_same(pair, asked):
    check_same(pair, ASKED[asked], rows())


def test_it_takes_fewer_steps(pair):
    """Else the tests above prove nothing: nothing proposed would ever have been taken."""
    without, given = (answers(engine, rows(1), ASKED["greedy"]) for engine in pair)
    assert given[3] < 0.7 * without[3]


def test_a_stop_token_within_what_was_proposed_ends_the_answer(pair):
    check_stops(pair)


def test_one_is_cancelled_the_others_go_on(pair):
    without = answers(pair[0], rows(), ASKED["greedy"])[0]
    tokens, _, reasons, _ = answers(pair[1], rows(), ASKED["greedy"], cancel=5)
    assert tokens[1:] == without[1:] and reasons[0] == [] and tokens[0] == without[0][: len(tokens[0])]


def test_with_the_prefix_cache(folder, pair):
    engine = openvino.open(folder, replace(LOOKUP, prefix_cache=True))
    expected = answers(pair[0], rows(), ASKED["greedy"])[0]
    assert answers(engine, rows(), ASKED["greedy"])[0] == expected
    assert answers(engine, rows(), ASKED["greedy"])[0] == expected
    engine.close()


def test_who_does_not_fit_into_the_cache_waits(pair, monkeypatch):
    """The runtime must never run out of blocks: with lookup it would give up on a request, or die."""
    monkeypatch.setattr(pair[1], "_blocks", 10)  # 40 + 96 + 5 tokens take five of them each
    most = []
    real = pair[1].step
    monkeypatch.setattr(pair[1], "step", lambda: (real(), most.append(len(pair[1]._running)))[0])
    assert answers(pair[1], rows(), ASKED["greedy"])[0] == answers(pair[0], rows(), ASKED["greedy"])[0]
    assert max(most) == 2 and not pair[1]._held
    with pytest.raises(RequestError, match="KV cache"):
        pair[1].submit([1] * 200, GenerationParams(max_tokens=116))


def test_prompts_can_be_scored(pair):
    row = rows(1, 600)[0]
    np.testing.assert_allclose(pair[1].prompt_logprobs(row), pair[0].prompt_logprobs(row), atol=1e-4)


def test_an_engine_without_it_says_so(folder):
    with pytest.raises(UnsupportedError, match="prompt lookup"):
        onnx.open(folder, EngineSettings(prompt_lookup=3))
