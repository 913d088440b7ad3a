"""The best engine settings for a load: one dimension after the other, each candidate in a short run, the best again.

What is measured is not known here: `Trials` puts the load on a candidate and judges it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lightship.tuning import Chosen, Figures, Row, label

GAIN = 1.03  # a candidate of the first, short runs must be this much faster to be taken for better
DROP = 0.8  # one with less than this share of the best one's speed is stopped
SURE = 1.02  # after the repeated runs the winner must be this much faster than the defaults
ONCE = 1.1  # alike, where the budget left one run of each
FINALS = 3  # runs of each finalist
FINAL_SHARE = 0.4  # of the budget, kept for them
ARITHMETIC = ("inference_precision", "kv_precision", "dynamic_quantisation_group")


@dataclass(frozen=True)
class Candidate:
    """A target and the settings to open it with."""

    target: str
    settings: Chosen

    def with_(self, **changes: object) -> Candidate:
        """The same with other settings."""
        return Candidate(self.target, self.settings.model_copy(update=changes))


@dataclass(frozen=True)
class Judgement:
    """Quality of a candidate: nats on the golden rows, and what speaks against it, None for nothing."""

    kld: float | None
    served: float | None
    problem: str | None


class Failed(Exception):
    """A candidate could not be measured: the engine refuses its settings, or died of them."""


class Trials(Protocol):
    """What puts candidates to the test, in processes of their own."""

    def load(self, candidate: Candidate, slowest: float | None = None) -> Figures | None:
        """One run of the load, the same work for all; None when it shows less than `slowest` tokens a second. Raises
        `Failed`."""
        ...

    def judge(self, candidate: Candidate) -> Judgement:
        """Replay the golden rows with these settings. Raises `Failed`."""
        ...

    def left(self) -> float:
        """Seconds of the budget that are left."""
        ...

    def seconds(self) -> float:
        """What the longest run so far took, loading included."""
        ...


Dimension = Callable[[Candidate], Sequence[Candidate]]


@dataclass
class Search:
    """`whole`: seconds of the budget. `dimensions`: each names the candidates that differ from the best so far in one
    thing. `limits`: seconds that the 90th percentiles of `ttft` and `tpot` must keep."""

    trials: Trials
    whole: float
    start: Candidate
    dimensions: Sequence[Dimension]
    limits: Mapping[str, float] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    rows: dict[Candidate, Row] = field(default_factory=dict)
    _fine: set[tuple[object, ...]] = field(default_factory=set)

    def run(self) -> tuple[Row, Row]:
        """(winner, defaults), both with figures; every candidate stands in `rows`.

        Raises `Failed` when the defaults cannot be measured or break the limit of the bundle.
        """
        self._announce(0, self.start)
        first = self.trials.load(self.start)
        assert first is not None  # without a deadline it is done
        self._put(self.start, "kept: the defaults", screening=first)
        if not self._accepted(self.start):
            raise Failed(self.rows[self.start].verdict)
        best = self.start
        for number, dimension in enumerate(self.dimensions, 1):
            best = self._descend(best, dimension, number)
        return self._finals(best)

    # ── One dimension after the other ───────────────────────────────────────

    def _descend(self, best: Candidate, dimension: Dimension, number: int) -> Candidate:
        for candidate in dimension(best):
            if candidate in self.rows:
                continue
            if self.trials.left() - FINAL_SHARE * self.whole < self.trials.seconds():
                self._put(candidate, "not measured: the budget was used up")
                continue
            self._announce(number, candidate)
            if self._try(candidate, best):
                best = candidate
        return best

    def _try(self, candidate: Candidate, best: Candidate) -> bool:
        """Measure a candidate; whether it is better than the best so far."""
        before = self.rows[best].screening
        assert before is not None
        slowest = None if self._excess(before) else DROP * before.tokens_per_second
        try:
            found = self.trials.load(candidate, slowest)
        except Failed as error:
            self._put(candidate, f"failed: {error}"[:300])
            return False
        if found is None:
            self._put(candidate, f"stopped: less than {DROP:g}× the best before it")
            return False
        faster = f"{found.tokens_per_second / max(before.tokens_per_second, 1e-9):.2f}× the best before it"
        if not self._better(found, before, GAIN):
            late = self._late(found)
            self._put(candidate, f"no better: {faster}" + (f"; {late}" if late else ""), screening=found)
            return False
        self._put(candidate, f"kept: {faster}", screening=found)
        return self._accepted(candidate, exactly=False)

    def _better(self, found: Figures, than: Figures, gain: float) -> bool:
        """Limits first: who breaks them less; then tokens a second, by more than noise."""
        mine, other = self._excess(found), self._excess(than)
        if mine or other:
            return mine < other
        return found.tokens_per_second > gain * than.tokens_per_second

    def _excess(self, figures: Figures) -> float:
        """By what share the worst limit is exceeded; 0 when all are kept."""
        return max([0.0, *(_p90(figures, name) / limit - 1 for name, limit in self.limits.items())])

    def _late(self, figures: Figures) -> str | None:
        over = [
            f"{name} {_p90(figures, name):.3g} s exceeds {limit:g} s"
            for name, limit in self.limits.items()
            if _p90(figures, name) > limit
        ]
        return ", ".join(over) or None

    def _accepted(self, candidate: Candidate, *, exactly: bool = True) -> bool:
        """Whether the golden rows keep the bundle's limit with these settings; asked once. Unless `exactly`, what was
        found with the same arithmetic will do."""
        row, same = self.rows[candidate], self._arithmetic(candidate)
        if row.verdict.startswith(("rejected", "failed")):
            return False
        if row.kld is not None or (not exactly and same in self._fine):
            return True
        try:
            found = self.trials.judge(candidate)
        except Failed as error:
            self._put(candidate, f"failed: {error}"[:300], row.screening)
            return False
        verdict = f"rejected: {found.problem}"[:300] if found.problem else row.verdict
        self.rows[candidate] = row.model_copy(update={"verdict": verdict, "kld": found.kld, "served": found.served})
        if found.problem:
            self.say(f"      {verdict}")
            return False
        self._fine.add(same)
        return True

    def _arithmetic(self, candidate: Candidate) -> tuple[object, ...]:
        """What decides the numbers; the rest of the settings moves at most their last bits."""
        return (candidate.target, *(getattr(candidate.settings, name) for name in ARITHMETIC))

    # ── The best again ──────────────────────────────────────────────────────

    def _finals(self, best: Candidate) -> tuple[Row, Row]:
        """Run the finalists in turns, so that a machine that changes its speed does so for all."""
        runs: dict[Candidate, list[Figures]] = {candidate: [] for candidate in self._finalists(best)}
        for turn in range(FINALS):
            for candidate in list(runs):
                if turn and self.trials.left() < self.trials.seconds():
                    continue
                self._announce(len(self.dimensions) + 1, candidate, f"run {turn + 1} of {FINALS}: ")
                try:
                    found = self.trials.load(candidate)
                except Failed as error:  # once is enough: whoever serves with it would meet it too
                    verdict = f"failed: {error}"[:300]
                    self.rows[candidate] = self.rows[candidate].model_copy(update={"verdict": verdict})
                    self.say(f"      {verdict}")
                    del runs[candidate]
                    continue
                assert found is not None
                runs[candidate].append(found)
        for candidate, found_runs in runs.items():
            if found_runs:
                self.rows[candidate] = self.rows[candidate].model_copy(update={"final": summed(found_runs)})
        return self._decided(runs)

    def _finalists(self, best: Candidate) -> list[Candidate]:
        """The defaults, the best two, and the best of each target that neither has: one short run of each, minutes
        apart, is too little to leave a runtime by."""
        found = list(itertools.islice(self._runners_up(best), 2))
        for target in dict.fromkeys(candidate.target for candidate in self.rows):
            if all(candidate.target != target for candidate in found):
                found += itertools.islice(self._runners_up(best, target), 1)
        return [self.start, *found]

    def _runners_up(self, best: Candidate, target: str | None = None) -> Iterator[Candidate]:
        """The best, then the others that were measured whole, the fastest first; only what is allowed, and of `target`
        where that is given."""
        others = [(row.screening, candidate) for candidate, row in self.rows.items()
                  if row.screening and candidate not in (best, self.start)]  # fmt: skip
        others.sort(key=lambda pair: (self._excess(pair[0]), -pair[0].tokens_per_second))
        for candidate in (best, *(candidate for _, candidate in others)):
            if candidate != self.start and target in (None, candidate.target) and self._accepted(candidate):
                yield candidate

    def _each(self, runs: Mapping[Candidate, Sequence[Figures]], candidate: Candidate) -> bool:
        """Whether a candidate was better than the defaults in every turn, not by its median alone."""
        return all(self._better(one, other, 1.0) for one, other in zip(runs[candidate], runs[self.start], strict=False))

    def _repeated(self, runs: Mapping[Candidate, Sequence[Figures]], candidate: Candidate) -> bool:
        """Whether it had more than one turn beside the defaults."""
        return min(len(runs[candidate]), len(runs[self.start])) > 1

    def _decided(self, runs: Mapping[Candidate, Sequence[Figures]]) -> tuple[Row, Row]:
        base = self.rows[self.start]
        if base.final is None:
            raise Failed(base.verdict)
        winner, top = self.start, base.final
        for candidate in runs:
            final = self.rows[candidate].final
            if (
                candidate == self.start
                or final is None
                or not self._better(final, base.final, SURE if self._repeated(runs, candidate) else ONCE)
                or not self._each(runs, candidate)
            ):
                continue
            if winner == self.start or self._better(final, top, 1.0):
                winner, top = candidate, final
        gain = top.tokens_per_second / max(base.final.tokens_per_second, 1e-9)
        said = "the defaults" if winner == self.start else f"{gain:.2f}× the defaults"
        late = self._late(top)
        verdict = f"winner: {said}" + (f"; no candidate kept the limits: {late}" if late else "")
        self.rows[winner] = self.rows[winner].model_copy(update={"verdict": verdict})
        return self.rows[winner], self.rows[self.start]

    # ── The table ───────────────────────────────────────────────────────────

    def _label(self, candidate: Candidate) -> str:
        return label(candidate.target, candidate.settings)

    def _announce(self, number: int, candidate: Candidate, what: str = "") -> None:
        """Open a stage, with the share of the budget that is used: the rest may not be needed."""
        used = min(round(100 * (1 - self.trials.left() / self.whole)), 99)
        self.say(f"[{number + 1}/{len(self.dimensions) + 2}, {used}%] {what}{self._label(candidate)}")

    def _put(
        self,
        candidate: Candidate,
        verdict: str,
        screening: Figures | None = None,
    ) -> None:
        row = Row(label=self._label(candidate)[:300], target=candidate.target, settings=candidate.settings,
                  verdict=verdict, screening=screening)  # fmt: skip
        self.rows[candidate] = row
        speed = "" if screening is None else f"{screening.tokens_per_second:.1f} tokens/s   "
        if not verdict.startswith("not measured"):
            self.say(f"      {speed}{verdict}")


def _p90(figures: Figures, name: str) -> float:
    return {"ttft": figures.ttft_p90, "tpot": figures.tpot_p90}[name]


def summed(runs: Sequence[Figures]) -> Figures:
    """Medians over several runs, with the slowest and the fastest."""
    speeds = [run.tokens_per_second for run in runs]
    names = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")
    medians = {name: statistics.median(getattr(run, name) for run in runs) for name in names}
    return Figures(tokens_per_second=statistics.median(speeds), least=min(speeds), most=max(speeds), n=len(runs),
                   **medians)  # fmt: skip
