"""The roundings against slow, obvious references in float64."""

import numpy as np
import pytest

from lightship.targets._integers import DAMPING, compensated, nearest, stored_bytes

ROWS, INPUTS, GROUP = 24, 64, 16


@pytest.fixture
def matrix():
    return np.random.default_rng(0).standard_t(4, (ROWS, INPUTS)).astype(np.float32)


@pytest.fixture
def hessian():
    """Of inputs that depend on one another: 200 of rank 20 and some noise."""
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(200, 20)) @ generator.normal(size=(20, INPUTS)) + generator.normal(size=(200, 1))
    return (inputs.T @ inputs).astype(np.float32)


def loss(matrix, integers, hessian):
    error = matrix.astype(np.float64) - integers.weights()
    return float(np.einsum("oi,ij,oj->", error, hessian.astype(np.float64), error))


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_is_nearest(matrix, bits):
    """Weight by weight: no other level is nearer, and the largest weight of a group ends the range."""
    found = nearest(matrix, bits, GROUP)
    last = 2 ** (bits - 1)
    for row in range(ROWS):
        for group in range(INPUTS // GROUP):
            weights = matrix[row, group * GROUP : (group + 1) * GROUP].astype(np.float64)
            scale = float(found.scales[row, group, 0])
            levels = np.arange(-last if bits == 4 else 1 - last, last)
            best = np.abs(weights[:, None] - levels * scale).min(axis=1)
            np.testing.assert_allclose(np.abs(weights - found.levels[row, group] * scale), best, atol=1e-6)
            assert abs(found.levels[row, group][np.abs(weights).argmax()]) == (last if bits == 4 else last - 1)


def test_groups_of_zeros_stay_zero(hessian):
    empty = np.zeros((3, INPUTS), np.float32)
    assert not nearest(empty, 4, GROUP).weights().any()
    assert not compensated(empty, hessian, 4, GROUP).weights().any()


def test_compensated_is_the_papers_algorithm(matrix, hessian):
    """Column by column, the inverse taken anew for the columns that are left, no blocks and no Cholesky factor: with
    the scales that were found the levels are the same."""
    found = compensated(matrix, hessian, 4, GROUP)
    weights = matrix.astype(np.float64)
    damped = hessian.astype(np.float64)
    damped += np.eye(INPUTS) * DAMPING * np.mean(np.diag(damped))
    different = 0
    for column in range(INPUTS):
        inverse = np.linalg.inv(damped[column:, column:])
        scale = found.scales[:, column // GROUP, 0].astype(np.float64)
        levels = np.clip(np.rint(weights[:, column] / scale), -8, 7)
        theirs = found.levels[:, column // GROUP, column % GROUP]
        different += int((levels != theirs).sum())
        error = (weights[:, column] - theirs * scale) / inverse[0, 0]
        weights[:, column:] -= error[:, None] * inverse[0]
    assert different <= 2  # weights that lie between two levels, but for float32


def test_compensated_loses_less_at_the_outputs(matrix, hessian):
    """By far: nearest rounding does not know that the inputs depend on one another."""
    assert loss(matrix, compensated(matrix, hessian, 4, GROUP), hessian) < 0.4 * loss(
        matrix, nearest(matrix, 4, GROUP), hessian
    )


def test_more_bits_lose_less(matrix, hessian):
    assert loss(matrix, compensated(matrix, hessian, 8, GROUP), hessian) < 0.02 * loss(
        matrix, compensated(matrix, hessian, 4, GROUP), hessian
    )


def test_an_input_that_never_occurs_is_no_division_by_zero(matrix, hessian):
    hessian[5], hessian[:, 5] = 0, 0
    assert np.isfinite(compensated(matrix, hessian, 4, GROUP).weights()).all()
    assert np.isfinite(compensated(matrix, np.zeros_like(hessian), 4, GROUP).weights()).all()


def test_bytes(matrix):
    assert stored_bytes(matrix.size, GROUP, 4) == nearest(matrix, 4, GROUP).size == ROWS * (32 + 2 * 4)
