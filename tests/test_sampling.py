"""Sampling against slow, obvious references: loops over plain lists."""

import math

import numpy as np
import pytest

from lightship.engine import GenerationParams
from lightship.sampling import choose, distribution, log_softmax, penalised

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1000},
]


def slow_distribution(logits, params):
    """Sort, cut one token at a time, normalise."""
    weights = [(math.exp((x - max(logits)) / params.temperature), token) for token, x in enumerate(logits)]
    weights.sort(key=lambda pair: (-pair[0], pair[1]))
    if params.top_k:
        weights = weights[: params.top_k]
    total = sum(weight for weight, _ in weights)
    kept, reached = [], 0.0
    for weight, token in weights:
        if kept and (reached >= params.top_p or weight < params.min_p * weights[0][0]):
            break
        kept.append((weight, token))
        reached += weight / total
    share = sum(weight for weight, _ in kept)
    return [dict((token, weight / share) for weight, token in kept).get(token, 0.0) for token in range(len(logits))]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_distribution(options):
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 2, 40)
        params = GenerationParams(**options)
        np.testing.assert_allclose(distribution(logits, params), slow_distribution(logits.tolist(), params), atol=1e-12)


def test_penalties():
    logits = np.random.default_rng(0).normal(0, 2, 20)
    prompt, produced = [3, 4, 4, 5], [5, 6, 6, 6]
    params = GenerationParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.25)
    expected = logits.tolist()
    for token in range(20):
        if token in prompt + produced:
            expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        if token in produced:
            expected[token] -= 0.5 - 0.25 * produced.count(token)
    before = logits.copy()
    np.testing.assert_allclose(penalised(logits, prompt, produced, params), expected, rtol=1e-14)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(penalised(logits, [], [], params), logits)


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -50.0])
    params = GenerationParams(temperature=1.0)
    random = np.random.default_rng(7)
    drawn = np.bincount([choose(logits, [], [], params, random) for _ in range(20_000)], minlength=4) / 20_000
    assert np.abs(drawn - distribution(logits, params)).max() < 0.012 and drawn[3] == 0  # three standard errors


def test_greedy_obeys_penalties_and_draws_nothing():
    random = np.random.default_rng(0)
    state = random.bit_generator.state
    logits = np.array([1.0, 5.0, 4.0], np.float32)
    assert choose(logits, [], [], GenerationParams(), random) == 1
    assert choose(logits, [], [1, 1], GenerationParams(frequency_penalty=1.0), random) == 2
    assert random.bit_generator.state == state


def test_log_softmax_of_large_logits():
    logits = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32)
    rest = math.log1p(math.exp(-1))
    expected = [[-rest, -1 - rest, -2e4 - rest], [-math.log(3)] * 3]
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-9)
