"""A decoder's body in int4, fitted to the original's outputs: each matrix to what those before it have become."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightship.errors import UnsupportedError, UsageError
from lightship.layers import weight_of
from lightship.targets._integers import Floats, Integers, compensated
from lightship.targets._sensitivity import body, key_of

DAMPING = 0.1  # of the mean of the Hessian's diagonal: how far a matrix may move to make good what came before it
LEAST_TOKENS = 2048  # of calibration; with fewer than a matrix has inputs, the fit is to noise


def fit(
    model: Any, rows: Sequence[Sequence[int]], group: int, narrow: Collection[str] | None = None
) -> dict[str, Integers]:
    """By key the body's matrices of `model` in int4, in groups of `group` along the input; `narrow`: only those.

    The original and the model that is being quantised read `rows` side by side, as two halves of one batch. When a
    matrix is reached, it is moved to where it maps the inputs as they have become onto the original's outputs (least
    squares; the asymmetric calibration of Li et al. 2025, arXiv:2504.02692, in closed form), then rounded by
    `compensated`. What follows is computed with it. One pass over the text, no gradients.

    Raises `UsageError` for too little text, `UnsupportedError` for groups that do not fit or a model in which not
    every token passes every matrix.
    """
    import torch

    from lightship.low_rank import LowRank

    if sum(map(len, rows)) < LEAST_TOKENS:
        raise UsageError(f"the calibration text has {sum(map(len, rows))} tokens, fitting needs {LEAST_TOKENS}",
                         hint="give a longer --text, or use --no-fit")  # fmt: skip
    modules = {name: module for name, module in body(model).items() if narrow is None or _key(module) in narrow}
    odd = [name for name, module in modules.items() if weight_of(module).shape[1] % group]
    if odd:
        raise UnsupportedError(f"groups of {group} do not divide the width of {odd[0]}",
                               hint="choose a --group-size that does, such as 64 or 32")  # fmt: skip
    ids = torch.tensor([list(row) for row in rows])
    with torch.inference_mode(), _fitted_as_reached(modules, len(ids), group) as state:
        said = model.base_model(input_ids=torch.cat([ids, ids]), use_cache=False)
        if isinstance(head := model.get_output_embeddings(), LowRank):
            head.reduce(said[0])
    if len(state.reached) < len(modules):
        missing = next(name for name in modules if name not in state.reached)
        raise UnsupportedError(f"{missing} is not used on the calibration text, so it cannot be fitted")
    return state.found


def _key(module: Any) -> str:
    return key_of(weight_of(module).float().numpy())


@dataclass
class _State:
    """What is known while the text passes: the products of the inputs last seen, which several matrices may share."""

    rows: int
    group: int
    found: dict[str, Integers] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    inputs: Any = None
    hessian: Any = None
    drift: Any = None

    def forward(self, name: str, module: Any, inputs: Any) -> Any:
        """In place of `module`'s own: its outputs for the original, and with its integers for the other half."""
        import torch

        if len(inputs) != 2 * self.rows or name in self.reached:
            raise UnsupportedError(f"{name} does not take each token once, so it cannot be fitted",
                                   hint="use --no-fit, or --awq")  # fmt: skip
        original, current = inputs[: self.rows].float(), inputs[self.rows :].float()
        if inputs is not self.inputs:
            before, now = original.flatten(0, -2), current.flatten(0, -2)
            self.inputs, self.hessian, self.drift = inputs, now.T @ now, (before - now).T @ now
        matrix = weight_of(module).float()
        integers = fitted(matrix.numpy(), self.hessian.numpy(), self.drift.numpy(), self.group)
        self.found[key_of(matrix.numpy())] = integers
        self.reached.add(name)
        other = torch.from_numpy(integers.weights())
        bias = None if module.bias is None else module.bias.float()
        outputs = [torch.nn.functional.linear(half, weights, bias)
                   for half, weights in ((original, matrix), (current, other))]  # fmt: skip
        return torch.cat(outputs).to(inputs.dtype)


def fitted(matrix: Floats, hessian: Floats, drift: Floats, group: int, bits: int = 4) -> Integers:
    """`matrix` (outputs, inputs) in integers. `hessian` is Σ x·xᵀ over its inputs x as they have become, `drift` is
    Σ (o − x)·xᵀ with o as the original has them, both (inputs, inputs)."""
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += max(DAMPING * float(np.mean(np.diag(damped))), 1e-12)
    moved = matrix + matrix @ np.linalg.solve(damped, drift.T.astype(np.float64)).T.astype(np.float32)
    return compensated(moved, hessian, bits, group)


@contextlib.contextmanager
def _fitted_as_reached(modules: dict[str, Any], rows: int, group: int) -> Iterator[_State]:
    from functools import partial

    state = _State(rows, group)
    for name, module in modules.items():
        module.forward = partial(state.forward, name, module)
    try:
        yield state
    finally:
        for module in modules.values():
            del module.forward
