"""Fitted integers and measured sensitivity, on tiny models of two architectures."""

import copy

import numpy as np
import pytest
import torch

from lightship.errors import UnsupportedError, UsageError
from lightship.layers import weight_of
from lightship.targets import _fitting, _sensitivity
from lightship.targets._integers import nearest
from lightship.targets._sensitivity import Cost, body, choose, key_of
from tests.tiny import tiny_gpt2, tiny_llama

GROUP = 32


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model")).load("float32")


def rows(count, length=256, seed=0):
    return np.random.default_rng(seed).integers(4, 500, (count, length)).tolist()


def drift(model, integers, ids):
    """Mean KLD of `model` with `integers` in place of its matrices."""
    other = copy.deepcopy(model)
    for module in body(other).values():
        key = key_of(weight_of(module).numpy())
        if key in integers:
            weight_of(module).copy_(torch.from_numpy(integers[key].weights()))
    with torch.inference_mode():
        exact, found = (each(input_ids=torch.tensor(ids)).logits.log_softmax(-1) for each in (model, other))
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def rounded(model, only=None):
    matrices = [weight_of(module).numpy() for module in body(model).values()]
    return {key_of(matrix): nearest(matrix, 4, GROUP) for matrix in matrices if only in (None, key_of(matrix))}


def test_fitted_is_nearer_than_rounded(model):
    """On tokens it has not seen. The model is left as it was."""
    before = {name: weight_of(module).clone() for name, module in body(model).items()}
    found = _fitting.fit(model, rows(16), GROUP)
    assert set(found) == set(rounded(model))
    unseen = rows(4, seed=1)
    assert drift(model, found, unseen) < 0.9 * drift(model, rounded(model), unseen)
    assert all(torch.equal(before[name], weight_of(module)) for name, module in body(model).items())
    assert not any("forward" in vars(module) for module in body(model).values())


def test_what_came_before_is_made_good():
    """Inputs that have become larger by a tenth: the matrix becomes smaller by as much, where rounding alone would
    keep it. Closed form against least squares on the inputs themselves."""
    generator = np.random.default_rng(0)
    original = generator.normal(size=(4096, 32))
    current = (1.1 * original).astype(np.float32)
    matrix = generator.normal(size=(8, 32)).astype(np.float32)
    hessian, moved = current.T @ current, (original - current).T @ current
    found = _fitting.fitted(matrix, hessian, moved.astype(np.float32), 32, bits=8).weights()
    damping = _fitting.DAMPING * np.mean(np.diag(hessian))
    target = np.linalg.solve(hessian + damping * np.eye(32), current.T @ original @ matrix.T + damping * matrix.T).T
    assert np.abs(found - target).max() < 0.03 < np.abs(matrix - target).max()


def test_only_what_is_asked_for_is_fitted(model):
    matrices = list(rounded(model))
    assert set(_fitting.fit(model, rows(16), GROUP, matrices[1:3])) == set(matrices[1:3])


def test_too_little_text_and_groups_that_do_not_fit(model):
    with pytest.raises(UsageError, match="512 tokens, fitting needs 2048"):
        _fitting.fit(model, rows(2), GROUP)
    with pytest.raises(UnsupportedError, match="groups of 48"):
        _fitting.fit(model, rows(16), 48)


def test_measured_alone_is_what_it_costs_alone(model):
    """The layers that are not computed again change nothing: the figures are those of a whole pass."""
    texts = rows(2, _sensitivity.TOKENS)
    costs = _sensitivity.measure(model, texts, GROUP)
    assert [cost.key for cost in costs] == list(rounded(model))
    for cost in costs:
        assert cost.kld == pytest.approx(drift(model, rounded(model, cost.key), texts), rel=1e-3, abs=1e-6)
    assert max(cost.kld for cost in costs) > 2 * min(cost.kld for cost in costs)


def test_what_costs_least_per_byte_goes_first():
    costs = [Cost("dear", 1000, 0.9), Cost("large", 4000, 0.4), Cost("cheap", 1000, 0.05), Cost("even", 1000, 0.2)]
    whole = 7000
    assert choose(costs, GROUP, whole) == frozenset()
    assert choose(costs, GROUP, whole - 1) == {"cheap"}
    assert choose(costs, GROUP, whole - 600) == {"cheap", "large"}
    saved = 7000 * (0.5 - 2 / GROUP)
    assert choose(costs, GROUP, whole - saved) == {"cheap", "large", "even", "dear"}
    with pytest.raises(UnsupportedError, match="all of it is in int4"):
        choose(costs, GROUP, whole - saved - 1)
