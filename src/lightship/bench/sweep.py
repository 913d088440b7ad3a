"""The knee: the highest rate at which enough requests meet every limit, and which limit breaks above it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightship.bench.figures import Figures

SHARES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0)  # of the closed-loop capacity
HALVINGS = 4  # where the lowest of them is too much already
BISECT = 2  # rates that narrow the knee down
Measure = Callable[[float], Awaitable[Figures]]


@dataclass(frozen=True)
class Step:
    """One rate that was tried."""

    rate: float
    figures: Figures
    holds: bool


@dataclass(frozen=True)
class Sweep:
    """All steps in the order in which they were tried, for goodput of at least `share`."""

    steps: tuple[Step, ...]
    share: float

    @property
    def knee(self) -> Step | None:
        """The highest rate that holds below the lowest that does not."""
        end = self.broke.rate if self.broke else float("inf")
        held = [step for step in self.steps if step.holds and step.rate < end]
        return max(held, key=lambda step: step.rate, default=None)

    @property
    def broke(self) -> Step | None:
        """The lowest rate that does not hold."""
        return min((step for step in self.steps if not step.holds), key=lambda step: step.rate, default=None)

    @property
    def reason(self) -> str | None:
        """The limit that most requests missed where it broke: a limit's name, or `failures`."""
        return None if self.broke is None else worst(self.broke.figures)

    def said(self) -> str:
        """The result in words."""
        broke, knee = self.broke, self.knee
        if knee is None and broke is not None:
            return f"No rate holds: at {broke.rate:.3g} requests/s {_goodput(broke)}, {explain(broke.figures)}."
        if knee is None:
            return "Nothing was measured."
        held = f"The knee: {knee.rate:.3g} requests/s ({_goodput(knee)})."
        if broke is None:
            return f"{held} No limit broke at any rate that was tried."
        return f"{held} At {broke.rate:.3g} {_goodput(broke)}: {explain(broke.figures)}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        knee, broke = self.knee, self.broke
        return {
            "share": self.share,
            "knee": None if knee is None else knee.rate,
            "broke": None if broke is None else {"rate": broke.rate, "limit": self.reason},
            "steps": [{**step.figures.to_dict(), "rate": step.rate, "holds": step.holds} for step in self.steps],
        }


def _goodput(step: Step) -> str:
    figures = step.figures
    return f"{figures.good} of {figures.requests} requests met every limit, {figures.goodput:.0%}"


def worst(figures: Figures) -> str:
    """The limit that most requests missed."""
    return max(figures.missed, key=lambda name: figures.missed[name])


def explain(figures: Figures) -> str:
    """`ttft broke (41 of 60 requests missed it; tpot 3, failures 0)`."""
    name = worst(figures)
    rest = ", ".join(f"{other} {count}" for other, count in figures.missed.items() if other != name)
    also = f"; {rest}" if rest else ""
    verb = "failed" if name == "failures" else "missed it"
    return f"{name} broke ({figures.missed[name]} of {figures.requests} {verb}{also})"


async def climb(
    measure: Measure, rates: Sequence[float], share: float, bisect: int = 0, halvings: int = 0,
    tell: Callable[[Step], None] = lambda step: None,
) -> Sweep:  # fmt: skip
    """Try `rates` from low to high until goodput falls below `share`; halve the lowest up to `halvings` times where it
    does at once; then narrow the knee down by `bisect` rates between the last that held and the first that did not."""
    steps: list[Step] = []

    async def holds(rate: float) -> bool:
        found = await measure(rate)
        steps.append(Step(rate, found, found.goodput >= share))
        tell(steps[-1])
        return steps[-1].holds

    low = high = None
    for rate in rates:
        if not await holds(rate):
            high = rate
            break
        low = rate
    while high is not None and low is None and halvings:
        halvings -= 1
        if await holds(high / 2):
            low = high / 2
        else:
            high /= 2
    while low is not None and high is not None and bisect:
        bisect -= 1
        middle = (low + high) / 2
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return Sweep(tuple(steps), share)
