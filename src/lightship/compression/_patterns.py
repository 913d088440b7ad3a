"""Which weights of a matrix become zero, by their score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lightship.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

Pattern = Literal["unstructured", "2:4", "4:8"]
PATTERN = "unstructured: compared as said; 2:4 and 4:8: half of every 4 or 8 neighbouring inputs of an output"


def check_pattern(pattern: Pattern, sparsity: float) -> None:
    """Raise `UsageError` for a sparsity that a pattern cannot have."""
    if pattern != "unstructured" and sparsity != 0.5:
        raise UsageError(f"the pattern {pattern} zeroes one half, a sparsity of {sparsity} was asked for",
                         hint="leave sparsity out, or take the pattern unstructured")  # fmt: skip


def zero_rows(weight: torch.Tensor, score: torch.Tensor, sparsity: float) -> None:
    """Zero in every row of `weight` (outputs, inputs) the share `sparsity`, rounded down, of lowest `score`; of equal
    ones the first."""
    count = int(sparsity * weight.shape[1])
    weight.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], 0)


def zero_groups(weight: torch.Tensor, score: torch.Tensor, pattern: Pattern, name: str) -> None:
    """Zero in every group of neighbouring inputs as many as `pattern` says, those of lowest `score`. Raises
    `UnsupportedError` where the inputs of the layer `name` are no whole number of groups."""
    zeros, group = map(int, pattern.split(":"))
    rows, inputs = weight.shape
    if inputs % group:
        raise UnsupportedError(f"{name} has {inputs} inputs, no multiple of {group} as the pattern {pattern} needs",
                               hint="take the pattern unstructured")  # fmt: skip
    order = score.reshape(rows, -1, group).argsort(dim=2, stable=True)[:, :, :zeros]
    starts = order.new_tensor(range(0, inputs, group))[None, :, None]
    weight.scatter_(1, (order + starts).reshape(rows, -1), 0)
