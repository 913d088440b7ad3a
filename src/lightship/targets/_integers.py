"""Matrices as integers with a scale for each group of weights: rounded to nearest, or one rounding after the other.

The latter makes good what a rounding spoils with those that follow it. The targets store what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
BLOCK = 128  # columns rounded before the columns behind them are corrected
SHRINKS = np.linspace(1.0, 0.6, 9)  # of a group's range: cutting its largest weights makes steps finer for the rest
CHUNK = 2**22  # weights at a time, for the memory


@dataclass(frozen=True)
class Integers:
    """A matrix (outputs, inputs) as `levels` (outputs, groups, weights of a group), int8 in −2^(bits−1) … 2^(bits−1)−1,
    times `scales` (outputs, groups, 1). A scale may be negative: the range has one step more on one side."""

    levels: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    bits: int

    def weights(self) -> Floats:
        """The matrix that these integers stand for, (outputs, inputs)."""
        found: Floats = self.levels.astype(np.float32) * self.scales.astype(np.float32)
        return found.reshape(len(found), -1)

    @property
    def size(self) -> int:
        """Bytes of the stored levels and scales."""
        return stored_bytes(self.levels.size, self.levels.shape[-1], self.bits)


def stored_bytes(weights: int, group: int, bits: int) -> int:
    """Bytes of `weights` integers of `bits` with a scale of 2 bytes for each `group` of them."""
    return weights * bits // 8 + 2 * (weights // group)


def nearest(matrix: Floats, bits: int, group: int) -> Integers:
    """`matrix` (outputs, inputs) rounded to nearest, the weight furthest from zero onto the end of the range: onto that
    with one step more in 4 bits; in 8 bits, where it is worth nothing, the range is symmetric."""
    groups = matrix.reshape(len(matrix), -1, group)
    levels = np.empty(groups.shape, np.int8)
    scales = np.empty((*groups.shape[:2], 1), np.float16)
    step = max(1, CHUNK // matrix.shape[1])
    last = 2 ** (bits - 1)
    for start in range(0, len(groups), step):
        rows = slice(start, start + step)
        if bits == 8:
            far = np.abs(groups[rows]).max(axis=-1, keepdims=True) / np.float32(last - 1)
        else:
            far = np.take_along_axis(groups[rows], np.abs(groups[rows]).argmax(-1)[..., None], -1) / np.float32(-last)
        scales[rows] = _never_zero(far)
        whole = np.rint(groups[rows] / scales[rows].astype(np.float32))
        levels[rows] = np.clip(whole, 1 - last if bits == 8 else -last, last - 1)
    return Integers(levels, scales, bits)


def _never_zero(scales: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    """`scales` in float16, none zero."""
    half = scales.astype(np.float16)
    smallest = np.float16(np.finfo(np.float16).smallest_subnormal)
    return np.where(half == 0, smallest, half)


def compensated(matrix: Floats, hessian: npt.NDArray[np.floating], bits: int, group: int) -> Integers:
    """`matrix` (outputs, inputs) rounded column by column, each error made good by the columns behind it (GPTQ, Frantar
    et al. 2022, arXiv:2210.17323), so that the outputs stay near rather than the weights.

    `hessian` (inputs, inputs): the sum of x·xᵀ over the inputs x. A group's scale is searched when its first column is
    reached, from the weights as they have been corrected by then: range cut or not, longer side above or below zero,
    whichever loses least by the weight that the Hessian gives each column.
    """
    inputs = matrix.shape[1]
    last = 2 ** (bits - 1)
    factor = _factor(hessian)
    importance = (1 / np.diag(factor) ** 2).astype(np.float32)
    columns = np.ascontiguousarray(matrix.T, np.float32)  # (inputs, outputs): a column of the matrix lies in one piece
    levels = np.empty(columns.shape, np.int8)
    scales = np.empty((inputs // group, matrix.shape[0]), np.float16)
    block = max(BLOCK // group, 1) * group  # whole groups: a scale is searched on weights that are all up to date
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = np.empty((stop - start, matrix.shape[0]), np.float32)
        for at in range(start, stop):
            if at % group == 0:
                members = slice(at, at + group)
                scales[at // group] = _best_scales(columns[members], importance[members], last)
            scale = scales[at // group].astype(np.float32)
            levels[at] = np.clip(np.rint(columns[at] / scale), -last, last - 1)
            error = (columns[at] - levels[at] * scale) / factor[at, at]
            errors[at - start] = error
            columns[at + 1 : stop] -= factor[at, at + 1 : stop, None] * error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    shaped = np.ascontiguousarray(levels.T).reshape(len(matrix), -1, group)
    return Integers(shaped, np.ascontiguousarray(scales.T)[..., None], bits)


def _factor(hessian: npt.NDArray[np.floating]) -> Floats:
    """The upper triangle U with UᵀU = H⁻¹, H damped. Inputs that never occur count as much as the damping."""
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += max(DAMPING * float(np.mean(np.diag(damped))), 1e-12)
    found: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return found


def _best_scales(weights: Floats, importance: Floats, last: int) -> npt.NDArray[np.float16]:
    """For `weights` (weights of a group, outputs) the scale of each output that loses least, (outputs)."""
    above, below = weights.max(axis=0), -weights.min(axis=0)
    lost: Floats = np.full(weights.shape[1], np.inf, np.float32)
    best = np.empty(weights.shape[1], np.float16)
    for whole in (np.maximum(above / (last - 1), below / last), -np.maximum(below / (last - 1), above / last)):
        for shrink in SHRINKS:
            half = _never_zero(whole * shrink)
            scale = half.astype(np.float32)
            error = weights - np.clip(np.rint(weights / scale), -last, last - 1) * scale
            now = importance @ np.square(error, out=error)
            better = now < lost
            lost[better], best[better] = now[better], half[better]
    return best
