"""How many ranks each linear layer gets, so that all together keep to a number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lightship.errors import UsageError

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What each rank of a layer (`outputs`, `inputs`) loses: `error[r]` at rank r for r = 0 … min(outputs, inputs),
    never rising, in one unit for all layers. A rank costs outputs + inputs parameters; the whole layer loses nothing
    and costs outputs · inputs. Only multiples of `grain` are given."""

    outputs: int
    inputs: int
    error: Values
    grain: int = 1

    @property
    def whole(self) -> int:
        """Parameters of the layer as it is."""
        return self.outputs * self.inputs

    @property
    def step(self) -> int:
        """Parameters of one rank."""
        return self.outputs + self.inputs

    @property
    def most(self) -> int:
        """The highest rank to give: with fewer parameters than the whole layer, so below r* = outputs · inputs /
        (outputs + inputs); 0 where there is none."""
        return (self.whole - 1) // self.step // self.grain * self.grain

    def cost(self, rank: int | None) -> int:
        """Parameters at `rank`, None being the whole layer."""
        return self.whole if rank is None else rank * self.step

    def loss(self, rank: int | None) -> float:
        """The error at `rank`."""
        return 0.0 if rank is None else float(self.error[rank])


Ranks = dict[str, int | None]


def uniform(curves: Mapping[str, Curve], keep: float) -> Ranks:
    """The share `keep` of every layer, rounded down to a rank that is given; one too small for any stays whole."""
    ranks = {name: min(int(keep * curve.whole / curve.step), curve.most) for name, curve in curves.items()}
    return {name: rank // curves[name].grain * curves[name].grain or None for name, rank in ranks.items()}


def allocate(curves: Mapping[str, Curve], budget: int) -> Ranks:
    """Ranks of least total error whose parameters are at most `budget`; None for a layer that stays whole.

    Greedy on the error per parameter saved along the lower convex hull of each layer's curve, which is optimal up to
    the last move; what that saves too much is then given back where it helps most. Raises `UsageError` for a budget
    below the smallest ranks.
    """
    least = sum(curve.grain * curve.step if curve.most else curve.whole for curve in curves.values())
    if budget < least:
        raise UsageError(f"{budget:,} parameters are kept of the linear layers; the smallest ranks need {least:,}",
                         hint="raise keep")  # fmt: skip
    moves = sorted((slope, name, rank) for name, curve in curves.items() for slope, rank in _hull(curve))
    ranks: Ranks = dict.fromkeys(curves)
    spent = sum(curve.whole for curve in curves.values())
    for _, name, rank in moves:
        if spent <= budget:
            break
        spent += curves[name].cost(rank) - curves[name].cost(ranks[name])
        ranks[name] = rank
    _give_back(curves, ranks, budget - spent)
    return ranks


def _hull(curve: Curve) -> list[tuple[float, int]]:
    """From the whole layer down to the smallest rank, the corners of the lower convex hull of (parameters, error): the
    error added for each parameter saved since the corner before, and the rank there."""
    corners: list[tuple[int, float, int]] = [(curve.whole, 0.0, 0)]
    for rank in range(curve.most, 0, -curve.grain):
        cost, loss = curve.cost(rank), curve.loss(rank)
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], (cost, loss, rank)):
            corners.pop()
        corners.append((cost, loss, rank))
    return [(_slope(before, after), after[2]) for before, after in pairwise(corners)]


def _slope(before: tuple[int, float, int], after: tuple[int, float, int]) -> float:
    return (after[1] - before[1]) / (before[0] - after[0])


def _give_back(curves: Mapping[str, Curve], ranks: Ranks, left: int) -> None:
    """Spend the `left` parameters on one step more, or the whole layer, wherever a parameter lowers the error most."""
    while True:
        best: tuple[float, int, str, int | None] | None = None
        for name, rank in ranks.items():
            if rank is None:
                continue
            curve = curves[name]
            for more in (rank + curve.grain if rank < curve.most else None, None):
                price = curve.cost(more) - curve.cost(rank)
                gain = (curve.loss(rank) - curve.loss(more)) / price
                if price <= left and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, price, name, more)
        if best is None:
            return
        left -= best[1]
        ranks[best[2]] = best[3]
