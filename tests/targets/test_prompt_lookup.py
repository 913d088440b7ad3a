"""Prompt lookup proposes what the text said before; the answer must stay token for token what it is without."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightship.decoder_pipeline import EXACT
from lightship.engine import EngineSettings, GenerationParams, Grammar
from lightship.errors import RequestError, UnsupportedError
from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from lightship.targets import onnx, openvino
from tests.tiny import tiny_llama

LOOKUP = replace(EXACT, prompt_lookup=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers add next to nothing, with a head of its own: what follows a token hardly depends on what was
    before it, so that a greedy answer soon goes in circles, which lookup finds."""
    place = tmp_path_factory.mktemp("circles")
    checkpoint = tiny_llama(place / "model", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 0.01
    model.save_pretrained(checkpoint.folder)
    return convert(Recipe(source=str(checkpoint.folder), precision=Precision(name="fp32")), place / "runtime")


def rows(count=4, length=40):
    return np.random.default_rng(1).integers(4, 500, (count, length)).tolist()


def answers(engine, prompts, params, cancel=None):
    """Tokens, log-probabilities and finish reasons of requests that run together, and the steps it took."""
    ids = [engine.submit(prompt, params) for prompt in prompts]
    tokens, logprobs, reasons = ({key: [] for key in ids} for _ in range(3))
    steps = 0
    while engine.busy():
        if cancel == steps:
            engine.cancel(ids[0])
        steps += 1
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
            logprobs[event.request_id] += event.logprobs
            if event.finish_reason:
                reasons[event.request_id].append(event.finish_reason)
    return list(tokens.values()), list(logprobs.values()), list(reasons.values()), steps


@pytest.fixture(scope="module")
def pair(folder):
    """Without and with lookup."""
    opened = openvino.open(folder, EXACT), openvino.open(folder, LOOKUP)
    yield opened
    for engine in opened:
        engine.close()


ASKED = {
    "greedy": GenerationParams(max_tokens=96, ignore_eos=True),
    "one token": GenerationParams(max_tokens=1, ignore_eos=True),
    "log-probabilities": GenerationParams(max_tokens=96, ignore_eos=True, logprobs=True),
    "sampled": GenerationParams(max_tokens=96, ignore_eos=True, temperature=0.3, top_p=0.9, seed=7, logprobs=True),
    "penalties": GenerationParams(max_tokens=64, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.3,
                                  frequency_penalty=0.2),
    "regular expression": GenerationParams(max_tokens=96, grammar=Grammar("regex", "(ab|ba){1,60}")),
    "JSON": GenerationParams(max_tokens=96, grammar=Grammar("json_schema", '{"type":"array","items":{"enum":[1,2]}}')),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_the_answer_is_the_same(pair, asked):
    without, given = (answers(engine, rows(), ASKED[asked]) for engine in pair)
    assert given[0] == without[0] and given[2] == without[2]
    for found, expected in zip(given[1], without[1], strict=True):
        assert len(found) == len(expected)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_it_takes_fewer_steps(pair):
    """Else the tests above prove nothing: nothing proposed would ever have been taken."""
    without, given = (answers(engine, rows(1), ASKED["greedy"]) for engine in pair)
    assert given[3] < 0.7 * without[3]


def test_a_stop_token_within_what_was_proposed_ends_the_answer(pair):
    """In a circle the token comes again; wherever it stands among those proposed, nothing after it may come out."""
    (answer,) = answers(pair[0], rows(1), ASKED["greedy"])[0]
    stops = {token: answer.index(token) for token in answer}
    for stop, place in list(stops.items())[-12:]:
        params = GenerationParams(max_tokens=96, stop_token_ids=(stop,))
        tokens, _, reasons, _ = answers(pair[1], rows(1), params)
        if 0 not in answer[:place]:  # the model's own end of text
            assert (tokens, reasons) == ([answer[:place]], [["stop"]])


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
