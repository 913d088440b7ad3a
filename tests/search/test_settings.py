"""The search over settings, with candidates whose speed and quality are invented: who wins, who is out, and why."""

import pytest

from lightship.search.settings import Candidate, Failed, Judgement, Search
from lightship.tuning import Chosen, Figures

START = Candidate("openvino", Chosen())


def figures(speed, ttft=1.0, tpot=0.1):
    return Figures(tokens_per_second=speed, least=speed, most=speed, n=1, ttft_p50=ttft, ttft_p90=ttft,
                   tpot_p50=tpot, tpot_p90=tpot)  # fmt: skip


class Invented:
    """`speed(settings)` → tokens a second, a tuple with ttft and tpot, or an exception; `bad(settings)` → what is wrong
    with its quality; each run takes a second of `budget`."""

    def __init__(self, speed, bad=lambda settings: None, budget=1000.0):
        self.speed, self.bad, self.budget, self.runs, self.judged = speed, bad, budget, [], []

    def load(self, candidate, slowest=None):
        self.runs.append(candidate)
        self.budget -= 1
        found = self.speed(candidate.settings)
        if isinstance(found, Exception):
            raise found
        found = figures(*found) if isinstance(found, tuple) else figures(found)
        return None if slowest is not None and found.tokens_per_second < slowest else found

    def judge(self, candidate):
        self.judged.append(candidate)
        return Judgement(0.001, 0.01, self.bad(candidate.settings))

    def left(self):
        return self.budget

    def seconds(self):
        return 1.0


def threads(*counts):
    return lambda best: [best.with_(threads=count) for count in counts]


def batched(*sizes):
    return lambda best: [best.with_(max_batched_tokens=size) for size in sizes]


def search(trials, *dimensions, limits=None):
    return Search(trials, trials.left(), START, dimensions, limits or {})


def test_each_dimension_builds_on_the_best_so_far():
    trials = Invented(lambda s: 100 + 20 * (s.threads == 2) + 10 * (s.max_batched_tokens == 1024))
    found = search(trials, threads(1, 2), batched(256, 1024))
    winner, base = found.run()
    assert (winner.settings.threads, winner.settings.max_batched_tokens) == (2, 1024)
    assert (winner.final.tokens_per_second, base.final.tokens_per_second, winner.final.n) == (130, 100, 3)
    assert winner.verdict == "winner: 1.30× the defaults"
    assert len(found.rows) == 5  # the defaults, two, and two on top of the better of these


def test_settings_that_break_the_limit_never_win():
    """However fast. The next best, which builds on nothing of it, does."""
    trials = Invented(
        lambda s: {"u4": 300, "u8": 150}.get(s.kv_precision, 100), lambda s: "worse" if s.kv_precision == "u4" else None
    )
    found = search(trials, lambda best: [best.with_(kv_precision=name) for name in ("u4", "u8")], batched(1024))
    winner, _ = found.run()
    rejected = found.rows[START.with_(kv_precision="u4")]
    assert winner.settings.kv_precision == "u8" and rejected.verdict == "rejected: worse"
    assert rejected.screening.tokens_per_second == 300  # it stays in the table, with its figures
    assert START.with_(kv_precision="u4", max_batched_tokens=1024) not in found.rows
    assert sum(candidate.settings.kv_precision == "u4" for candidate in trials.runs) == 1  # nor is it run again


@pytest.mark.parametrize("lucky", [130, 106])
def test_the_best_of_another_target_is_run_again(lucky):
    """One lucky short run of the first target, and a later one of the second, do not decide between the two."""
    short = {("openvino", 1): lucky, ("openvino", 2): lucky + 1}
    trials = Invented(None)

    def load(candidate, slowest=None):
        first = candidate not in trials.runs
        trials.runs.append(candidate)
        threads = candidate.settings.threads
        if candidate.target == "onnx":
            return figures(115 + (threads or 0))
        return figures(short.get((candidate.target, threads), 100) if first else 100)

    trials.load = load
    onnx = [Candidate("onnx", Chosen(threads=count)) for count in (1, 2)]
    found = search(trials, threads(1, 2), lambda best: onnx)
    winner, _ = found.run()
    assert (winner.target, winner.settings.threads) == ("onnx", 2)
    assert [row.label for row in found.rows.values() if row.final] == (
        ["openvino, defaults", "openvino, threads 1", "openvino, threads 2", "onnx, threads 2"] if lucky == 130
        else ["openvino, defaults", "openvino, threads 2", "onnx, threads 1", "onnx, threads 2"]
    )  # fmt: skip


@pytest.mark.parametrize("place", [1, 2, 3])
def test_who_fails_in_one_of_the_final_runs_does_not_win(place):
    """However fast it was in the others: a server would meet it too."""
    twos = iter(range(9))

    def speed(settings):
        if settings.threads == 2:
            return Failed("died") if next(twos) == place else 140
        return 130 if settings.threads == 3 else 100

    found = search(trials := Invented(speed), threads(2, 3))
    winner, _ = found.run()
    row = found.rows[START.with_(threads=2)]
    assert winner.settings.threads == 3 and winner.verdict == "winner: 1.30× the defaults"
    assert row.verdict == "failed: died" and row.final is None and row.kld == 0.001
    assert trials.runs.count(START.with_(threads=2)) == 1 + place  # it is not run again


def test_defaults_that_fail_in_a_final_run_cannot_be_measured():
    speeds = iter([100, 150, 100, 150, Failed("died"), 150, 150])
    with pytest.raises(Failed, match="failed: died"):
        search(Invented(lambda s: next(speeds)), threads(2)).run()


def test_the_winner_is_judged_with_exactly_its_settings():
    trials = Invented(lambda s: 100 + (s.threads or 0) * 50 + s.max_batched_tokens)
    winner, _ = search(trials, threads(2), batched(4096)).run()
    assert Candidate("openvino", winner.settings) in trials.judged and winner.kld == 0.001


def test_what_only_fails_when_judged_exactly_is_out():
    """Its arithmetic passed before, with other settings."""

    def bad(s):
        return "worse" if s.threads and s.max_batched_tokens == 4096 else None

    trials = Invented(lambda s: 100 * (1 + bool(s.threads)) * (1 + (s.max_batched_tokens > 512)), bad)
    found = search(trials, threads(2), batched(4096))
    winner, _ = found.run()
    assert winner.settings == Chosen(threads=2)
    assert found.rows[START.with_(threads=2, max_batched_tokens=4096)].verdict == "rejected: worse"


def test_the_defaults_win_unless_something_is_surely_faster():
    speeds = iter([100, 104, 100, 103, 100, 90, 100, 104])  # screening; then three turns of two
    trials = Invented(lambda s: next(speeds))
    winner, base = search(trials, threads(2)).run()
    assert winner == base and winner.verdict == "winner: the defaults"
    steady = iter([100, 104, 100, 103, 100, 102.5, 100, 104])
    winner, _ = search(Invented(lambda s: next(steady)), threads(2)).run()
    assert winner.settings.threads == 2


@pytest.mark.parametrize(("gain", "budget", "wins"), [(4, 4, False), (4, 100, True), (12, 4, True)])
def test_one_final_run_of_each_must_show_more_than_several(gain, budget, wins):
    trials = Invented(lambda s: 100 + gain * (s.threads == 2), budget=budget)
    winner, base = search(trials, threads(2)).run()
    assert base.final.n == (1 if budget == 4 else 3) and (winner.settings.threads == 2) is wins


def test_who_is_clearly_slower_is_stopped():
    found = search(Invented(lambda s: 50 if s.threads else 100), threads(2))
    found.run()
    assert found.rows[START.with_(threads=2)].verdict.startswith("stopped")


def test_a_candidate_that_cannot_run_stands_in_the_table():
    found = search(Invented(lambda s: Failed("no such type") if s.threads else 100), threads(2), batched(1024))
    winner, _ = found.run()
    assert winner.settings == Chosen()
    assert found.rows[START.with_(threads=2)].verdict == "failed: no such type"


def test_limits_come_before_speed():
    """The fast one is late for its first token; of two that keep the limit the faster wins."""
    speeds = {None: (100, 2.0), 1: (200, 5.0), 2: (120, 1.0), 3: (150, 2.9)}
    found = search(Invented(lambda s: speeds[s.threads]), threads(1, 2, 3), limits={"ttft": 3.0})
    winner, _ = found.run()
    assert winner.settings.threads == 3
    assert "ttft 5 s exceeds 3 s" in found.rows[START.with_(threads=1)].verdict


def test_when_none_keeps_the_limits_the_one_that_is_least_late_wins():
    speeds = {None: (100, 9.0), 1: (50, 4.0)}
    winner, _ = search(Invented(lambda s: speeds[s.threads]), threads(1), limits={"ttft": 3.0}).run()
    assert winner.settings.threads == 1 and "no candidate kept the limits: ttft 4 s exceeds 3 s" in winner.verdict


def test_the_budget_ends_the_search():
    trials = Invented(lambda s: 100 + s.max_batched_tokens, budget=8)
    found = search(trials, batched(*range(600, 700)))
    winner, _ = found.run()
    verdicts = [row.verdict for row in found.rows.values()]
    assert verdicts.count("not measured: the budget was used up") > 90
    assert len(trials.runs) <= 8 + 3 and winner.verdict.startswith("winner")


def test_defaults_that_break_the_limit_are_an_error():
    with pytest.raises(Failed, match="rejected: worse"):
        search(Invented(lambda s: 100, lambda s: "worse"), threads(2)).run()
