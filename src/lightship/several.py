"""Several targets in one run: their stages, those that keep their limits, and how their figures are told apart.

Both walks, of what generates and of encoders, take every target through the same stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightship.errors import LimitExceeded
from lightship.report import Metric
from lightship.work import Progress, Stage

Made = TypeVar("Made")


def stages(targets: Mapping[str, Sequence[str]], after: Sequence[str] = ()) -> tuple[str, ...]:
    """Every stage of a run, in order: the original's, those of every target, and what comes `after`."""
    return ("read", "original", *(f"{stage} {target}" for target, each in targets.items() for stage in each), *after)


@dataclass(frozen=True)
class Passed(Generic[Made]):
    """What was `made` for the targets that kept their limits; `failures`: the others, and why."""

    made: Mapping[str, Made]
    failures: Mapping[str, str]


def passed(targets: Iterable[str], make: Callable[[str], Made], say: Progress) -> Passed[Made]:
    """`make` for every target. Who raises `LimitExceeded` is left out, and said, as long as another one is made; where
    none is, the first one's error is raised."""
    made: dict[str, Made] = {}
    failures: dict[str, LimitExceeded] = {}
    every = tuple(targets)
    for target in every:
        try:
            made[target] = make(target)
        except LimitExceeded as failure:
            failures[target] = failure.with_traceback(None)  # whose frames would keep the model in memory
            say(f"{target} is above its limit" + (": left out" if len(every) > 1 else ""))
    if not made:
        raise failures[every[0]]
    return Passed(made, {target: _first_line(failure) for target, failure in failures.items()})


def _first_line(failure: LimitExceeded) -> str:
    return failure.message.splitlines()[0].removesuffix("; nothing is shipped")


@dataclass(frozen=True)
class Runtime:
    """A runtime folder as a stage made it, and the gates that it passed."""

    stage: Stage
    gates: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """The runtime folder itself."""
        return self.stage.folder / "runtime"

    @property
    def metrics(self) -> list[Metric]:
        """What the gates measured."""
        return [metric for gate in self.gates for metric in metrics(gate.result)]


def metrics(result: Mapping[str, Any]) -> list[Metric]:
    """The metrics that a stage's result keeps."""
    return [Metric(**entry) for entry in result["metrics"]]


def kept(found: Iterable[Metric]) -> dict[str, Any]:
    """A stage's result that keeps these metrics."""
    return {"metrics": [asdict(metric) for metric in found]}
