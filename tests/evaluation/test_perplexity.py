"""Perplexity against slow references, and the refusal of numbers that mean nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightship.errors import LightshipError
from lightship.evaluation import divergence
from lightship.evaluation.divergence import Comparison
from lightship.evaluation.perplexity import mean_stderr, perplexity, quality


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    uniform = [np.full(40, -math.log(256))]
    ppl, bits, ratio = perplexity(uniform, uniform, text_bytes=40)
    assert ppl.value == pytest.approx(256) and ppl.baseline == pytest.approx(256) and ppl.stderr == pytest.approx(0)
    assert bits.value == pytest.approx(8) and ratio.value == 1.0
    assert perplexity(uniform, uniform, text_bytes=160)[1].value == pytest.approx(2)


def test_values_and_errors_by_hand() -> None:
    original, candidate = [np.array([-1.0, -2.0, -3.0])], [np.array([-1.5, -2.0, -4.0])]
    ppl, bits, ratio = perplexity(original, candidate, text_bytes=12)
    assert ppl.value == pytest.approx(math.exp(2.5)) and ppl.baseline == pytest.approx(math.exp(2))
    assert ppl.stderr == pytest.approx(math.exp(2.5) * np.std([1.5, 2, 4], ddof=1) / math.sqrt(3))
    assert bits.value == pytest.approx(7.5 / math.log(2) / 12) and bits.baseline == pytest.approx(6 / math.log(2) / 12)
    assert ratio.value == pytest.approx(math.exp(0.5)) and ratio.direction == "lower"
    assert ratio.stderr == pytest.approx(math.exp(0.5) * np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))


def test_stderr_agrees_with_the_spread_of_many_repetitions() -> None:
    random = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:  # tokens of one passage share a difficulty, as real ones do
        return [random.normal(-3, 0.5) + random.normal(0, 1, 30) for _ in range(40)]

    draws = [draw() for _ in range(300)]
    spread = np.std([np.concatenate(one).mean() for one in draws])
    clustered = np.mean([mean_stderr(one) for one in draws])
    naive = np.mean([mean_stderr([np.concatenate(one)]) for one in draws])
    assert clustered == pytest.approx(spread, rel=0.1)
    assert naive < 0.6 * spread  # why passages are the unit


def test_paired_ratio_is_sharper_than_either_perplexity() -> None:
    random = np.random.default_rng(1)
    original = [random.normal(-3, 1, 50) - 3 for _ in range(10)]
    candidate = [passage - 0.01 for passage in original]
    ppl, _, ratio = perplexity(original, candidate, 2000)
    assert ratio.value == pytest.approx(math.exp(0.01))
    assert ratio.stderr is not None and ppl.stderr is not None and ratio.stderr < 1e-9 < ppl.stderr


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_loss_that_is_not_finite_raises(bad: float) -> None:
    fine, broken = [np.array([-1.0, -2.0])], [np.array([-1.0, bad])]
    with pytest.raises(LightshipError, match="candidate's loss is not finite on 1 of 2"):
        perplexity(fine, broken, 8)
    with pytest.raises(LightshipError, match="original's loss is not finite"):
        perplexity(broken, fine, 8)


def test_nonsense_raises() -> None:
    fine = [np.array([-1.0, -2.0])]
    with pytest.raises(LightshipError, match="above 0"):
        perplexity(fine, [np.array([-1.0, 2.0])], 8)
    with pytest.raises(LightshipError, match="same tokens"):
        perplexity(fine, [np.array([-1.0])], 8)
    with pytest.raises(LightshipError, match="no token"):
        perplexity([np.array([])], [np.array([])], 8)
    with pytest.raises(LightshipError, match="overflows"):
        perplexity(fine, [np.array([-2000.0, -2000.0])], 8)


def comparison(candidate: list[float], kld: list[float], passages: str = "00") -> Comparison:
    n = len(kld)
    return Comparison(np.array(kld, np.float32), np.array([True] * (n - 1) + [False]),
                      np.array([False] * (n - 1) + [True]), np.ones(n, np.float32),
                      np.zeros(n, np.float32), np.full(n, -1.0, np.float32), np.array(candidate, np.float32),
                      np.array([passages[i % len(passages)] for i in range(n)]))  # fmt: skip


def test_quality_of_passages() -> None:
    """Two passages of two tokens whose values agree within each: as many draws as passages, not as tokens."""
    found = comparison([-2.0, -2.0, -3.0, -3.0], [0.1, 0.1, 0.3, 0.3], "0011")
    metrics = {m.name: m for m in quality(found, text_bytes=6, scored="all tokens")}
    assert metrics["perplexity"].n == 4 and metrics["perplexity"].value == pytest.approx(math.exp(2.5))
    assert metrics["kld"].value == pytest.approx(0.2) and metrics["kld"].stderr == pytest.approx(0.1)
    assert metrics["top1"].value == 0.75 and metrics["flips"].value == 0.25


def test_quality_of_a_broken_candidate_raises() -> None:
    with pytest.raises(LightshipError, match="loss is not finite"):
        quality(comparison([-2.0, -np.inf, -2.0, -2.0], [0.1, 0.1, 0.1, 0.5]), text_bytes=6, scored="all tokens")
    with pytest.raises(LightshipError, match="divergence is not finite"):
        quality(comparison([-2.0, -2.0, -2.0, -2.0], [0.1, np.inf, 0.1, 0.5]), text_bytes=6, scored="all tokens")


def test_a_flip_is_a_position_where_exactly_one_of_both_is_right() -> None:
    """Rows: both right, wrong alike, wrong otherwise, only the original right, only the other one, no label."""
    original, candidate = (np.log(np.full((6, 3), 0.1) + 0.7 * np.eye(3)[best]).astype(np.float32)
                           for best in ([0, 1, 1, 0, 1, 0], [0, 1, 2, 1, 0, 1]))  # fmt: skip
    label = np.array([0, 0, 0, 0, 0, -1])
    flip = divergence._compare_rows(original, candidate, label)[2]
    assert flip.tolist() == [False, False, False, True, True, False]
