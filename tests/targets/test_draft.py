"""A draft proposes; the answer must stay token for token what it is without, whether the draft is good or bad."""

import random
from dataclasses import replace

import numpy as np
import pytest

from lightship.decoder_pipeline import EXACT
from lightship.draft import cache_gb, total_cache_gb
from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import ContextTooLong, EngineError, RequestError, UnsupportedError
from lightship.targets import onnx, openvino
from lightship.targets._openvino_decoder import OpenVINOEngine
from tests.targets.proposing import ASKED, answers, check_same, check_stops, circling, rows

TOKENS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and another that says other things."""
    place = tmp_path_factory.mktemp("drafts")
    return {"itself": circling(place / "model", scale=1.0), "another": circling(place / "other", num_hidden_layers=1)}


def opened(folders, draft, **changes):
    settings = replace(EXACT, draft=str(folders[draft]), draft_tokens=TOKENS, **changes)
    return openvino.open(folders["itself"], settings)


@pytest.fixture(scope="module")
def plain(folders):
    """Without a draft."""
    engine = openvino.open(folders["itself"], EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["itself", "another"])
def pair(request, folders, plain):
    """Without and with a draft: the model itself, whose proposals are right, or one whose proposals are wrong."""
    engine = opened(folders, request.param)
    yield plain, engine
    engine.close()


@pytest.mark.parametrize("asked", ASKED)
def test_the_answer_is_the_same(pair, asked):
    check_same(pair, ASKED[asked], rows())


def test_sampled_answers_are_the_same_for_every_seed(pair):
    """The runtime's own rule for sampled tokens compares the probabilities of different ones."""
    for seed in range(4):
        params = replace(ASKED["sampled"], seed=seed, temperature=0.4 + 0.3 * seed, top_p=1.0)
        check_same(pair, params, rows(6))


def test_what_the_model_proposes_to_itself_is_taken(folders):
    """Else the tests above prove nothing: nothing proposed would ever have been taken."""
    engine = opened(folders, "itself")
    assert answers(engine, rows(1), ASKED["greedy"])[3] == 96 // (TOKENS + 1) + 1
    engine.close()


def test_prompts_longer_than_a_step_begin_together(pair):
    """Read in pieces, such prompts get a token twice from the runtime (2026.4)."""
    for name in ("greedy", "sampled"):
        check_same(pair, ASKED[name], rows(6, 700))


def coming_and_going(engine, cancels):
    """Requests of all lengths that come over time; `cancels` is the share of steps after which one is given up."""
    plan, chance, prompts = random.Random(1), random.Random(2), rows(30, 1000)
    tokens: dict[int, list[int]] = {}
    while len(tokens) < 30 or engine.busy():
        for _ in range(plan.choice((0, 1, 3)) if len(tokens) < 30 else 0):
            if (number := len(tokens)) < 30:
                params = GenerationParams(max_tokens=plan.choice((1, 2, 20, 60)), ignore_eos=True, seed=number,
                                          temperature=plan.choice((0.0, 0.6)))  # fmt: skip
                tokens[engine.submit(prompts[number][: plan.choice((5, 40, 200, 1000))], params)] = []
        if chance.random() < cancels and tokens:
            engine.cancel(chance.choice(list(tokens)))
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
    return list(tokens.values())


@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": 3, "max_batched_tokens": 64}, {"prefix_cache": True}])
def test_who_comes_later_or_leaves_early_disturbs_nobody(folders, plain, changes):
    engine = opened(folders, "another", **changes)
    whole = coming_and_going(plain, 0.0)
    assert coming_and_going(engine, 0.0) == whole
    parts = coming_and_going(engine, 0.3)
    assert all(part == answer[: len(part)] for part, answer in zip(parts, whole, strict=True)) and parts != whole
    engine.close()


def test_prompts_with_the_same_beginning_in_the_prefix_cache(folders, plain):
    engine = opened(folders, "another", prefix_cache=True)
    start = rows(1, 600)[0]
    prompts = [start[: 500 + 17 * number] + end for number, end in enumerate(rows(6, 30))]
    expected = answers(plain, prompts, ASKED["greedy"])[0]
    for _ in range(3):
        assert answers(engine, prompts, ASKED["greedy"])[0] == expected
    engine.close()


def test_a_stop_token_within_what_was_proposed_ends_the_answer(pair):
    check_stops(pair)


def test_prompts_can_be_scored(pair):
    row = rows(1, 600)[0]
    np.testing.assert_allclose(pair[1].prompt_logprobs(row), pair[0].prompt_logprobs(row), atol=1e-4)


def test_who_does_not_fit_into_the_caches_waits(folders, plain, monkeypatch):
    """Pools of ten blocks, really: 40 + 96 + 4 tokens take five of them each."""
    real = OpenVINOEngine._scheduler

    def small(self, settings, cache):
        scheduler = real(self, settings, cache)
        scheduler.cache_size, scheduler.num_kv_blocks = 0, 10
        return scheduler

    monkeypatch.setattr(OpenVINOEngine, "_scheduler", small)
    engine = opened(folders, "another")
    assert engine.stats()["blocks"] == 10
    for name in ("greedy", "sampled"):
        assert answers(engine, rows(9), ASKED[name])[0] == answers(plain, rows(9), ASKED[name])[0]
    assert not engine._held
    with pytest.raises(RequestError, match="KV cache"):
        engine.submit([1] * 200, GenerationParams(max_tokens=117))
    engine.close()


def test_its_cache_holds_as_many_tokens(folders, tmp_path):
    """Two layers of the same heads, and one: 16 values a head, and as many for their scale at most."""
    large, small = folders["itself"], folders["another"]
    assert cache_gb(large, small, 8) == 8 * (16 + 16) / (2 * 16)
    assert cache_gb(small, large, 3) == 3 * 2 * (16 + 16) / 16
    settings = EngineSettings(kv_cache_gb=2)
    assert total_cache_gb(large, settings) == 2
    assert total_cache_gb(large, replace(settings, draft=str(small))) == 4
    (tmp_path / "openvino_model.xml").write_text('<data variable_shape="?,7" />')
    with pytest.raises(UnsupportedError, match="no keys and values"):
        cache_gb(large, tmp_path, 1)


def test_the_shorter_context_holds(folders, tmp_path):
    short = circling(tmp_path, num_hidden_layers=1, max_position_embeddings=128)
    engine = openvino.open(folders["itself"], replace(EXACT, draft=str(short), draft_tokens=2))
    with pytest.raises(ContextTooLong):
        engine.submit([1] * 100, GenerationParams(max_tokens=29))
    assert engine.stats()["context"] == 128
    engine.close()


def test_what_cannot_be_is_said(folders, tmp_path):
    draft = str(folders["another"])
    for wrong in ({"prompt_lookup": 3, "draft_tokens": 3}, {"draft_tokens": 0}):
        with pytest.raises(UnsupportedError, match="draft"):
            openvino.open(folders["itself"], replace(EXACT, draft=draft, **wrong))
    with pytest.raises(UnsupportedError, match="draft"):
        onnx.open(folders["itself"], EngineSettings(draft=draft, draft_tokens=3))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "openvino_model.xml").write_bytes((folders["another"] / "openvino_model.xml").read_bytes())
    with pytest.raises(EngineError, match="cannot serve"):
        openvino.open(folders["itself"], replace(EXACT, draft=str(tmp_path), draft_tokens=3))
