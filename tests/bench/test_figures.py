"""Figures against a slow, obvious computation, and what they refuse to say."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest

from lightship.bench.client import Seen
from lightship.bench.figures import Distribution, Limit, figures, needed, ranks
from lightship.bench.loop import Run
from lightship.bench.record import Record
from lightship.bench.tell import told
from lightship.errors import UsageError


def whole(number, due=0.0, first=1.0, each=0.1, tokens=11, **changes):
    """An answer that was due and sent at `due`."""
    last = due + first + each * (tokens - 1)
    return replace(Seen(number, "whole", due, due, due + first, last, last, tokens, "usage", 7), **changes)


def slow_percentile(values, percent):
    """Linear between the two neighbours of rank percent · (n − 1)."""
    ordered, place = sorted(values), percent / 100 * (len(values) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def test_against_a_slow_computation():
    chance = random.Random(0)
    seen = [whole(n, due=n / 3, first=chance.uniform(0.1, 4), each=chance.uniform(0.01, 0.5)) for n in range(120)]
    outcomes = itertools.cycle(["failed", "broken", "refused", "short", "timeout"])
    seen = [each if n % 12 else replace(each, outcome=next(outcomes)) for n, each in enumerate(seen)]
    found = figures(Run(tuple(seen), 50.0, rate=3.0), [Limit("ttft", 2.0), Limit("tpot", 0.25)])
    good = [each for n, each in enumerate(seen) if n % 12]
    ttft = [each.first - each.scheduled for each in good]
    tpot = [(each.last - each.first) / 10 for each in good]
    for values, distribution in ((ttft, found.ttft), (tpot, found.tpot)):
        assert distribution.n == 110 and distribution.mean == pytest.approx(sum(values) / 110)
        for percent in (50, 90, 95, 99):
            assert distribution.value(f"p{percent}") == pytest.approx(slow_percentile(values, percent))
    within = sum(a <= 2.0 and b <= 0.25 for a, b in zip(ttft, tpot, strict=True))
    assert (found.good, found.goodput, found.good_per_second) == (within, within / 120, within / 50)
    assert found.missed == {"ttft": sum(a > 2 for a in ttft), "tpot": sum(b > 0.25 for b in tpot), "failures": 10}
    assert found.output_tokens == 1210 and found.tokens_per_second == 1210 / 50 and found.requests_per_second == 2.2
    assert found.input_tokens == 770 and found.counted == "usage"


def test_what_failed_is_never_a_fast_one():
    """Ninety answers at 1 s and ten that failed after a millisecond: no time knows of the ten."""
    seen = [whole(n) for n in range(90)]
    for outcome in ("failed", "broken", "refused", "short", "timeout", "left"):
        fast = [whole(n, first=0.001, each=0.0, outcome=outcome) for n in range(90, 100)]
        found = figures(Run((*seen, *fast), 10.0), [Limit("ttft", 2), Limit("e2e", 60)])
        assert found.ttft.n == found.tpot.n == found.e2e.n == 90 and found.ttft.mean == pytest.approx(1.0)
        assert found.good == 90 and found.output_tokens == 990


def test_an_answer_that_the_model_ended_is_not_a_fast_one_either():
    stopped = whole(0, tokens=3, outcome="stopped")
    found = figures(Run((stopped, whole(1)), 10.0), [Limit("ttft", 2)])
    assert (found.ttft.n, found.tpot.n, found.e2e.n, found.good) == (2, 2, 1, 2)
    assert "1 of 2 answers were ended by the model" in " ".join(told(found).split())
    assert not Limit("e2e", 60).met(stopped) and Limit("e2e", 60).met(whole(0))
    single = whole(0, tokens=1)
    assert Limit("tpot", 0.1).met(single) and not Limit("tpot", 0.1).met(replace(single, outcome="stopped"))


@pytest.mark.parametrize(("percent", "n"), [(50, 2), (90, 10), (95, 20), (99, 100)])
def test_percentiles_only_where_n_allows(percent, n):
    assert needed(percent) == n
    assert Distribution.of(range(n - 1)).quantiles[f"p{percent}"] is None
    assert Distribution.of(range(n)).quantiles[f"p{percent}"] is not None


def test_nothing_answered():
    found = figures(Run((whole(0, outcome="failed", reason="no"),), 1.0))
    assert found.ttft.n == 0 and found.ttft.mean is None and found.goodput == 0.0
    assert "1× no" in told(found) and "–" in told(found)
    with pytest.raises(UsageError):
        figures(Run((), 0.0))


def slow_ranks(n, share):
    """From the definition: the widest tails of the binomial distribution that hold 2.5 % each."""
    pmf = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    low = [r for r in range(1, n + 1) if sum(pmf[:r]) <= 0.025]
    high = [r for r in range(1, n + 1) if sum(pmf[:r]) >= 0.975]
    return (max(low) if low else None), (min(high) if high else None)


@pytest.mark.parametrize("n", [2, 5, 6, 10, 35, 100, 300])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_ranks_of_an_interval(n, share):
    assert ranks(n, share) == slow_ranks(n, share)


def test_an_interval_covers_what_it_says():
    """Of 2 000 samples of 40 uniform values, at least 95 % (less 3 standard errors) hold the true median."""
    chance = random.Random(0)
    hits = 0
    for _ in range(2000):
        median = Distribution.of([chance.random() for _ in range(40)]).quantiles["p50"]
        hits += median.low <= 0.5 <= median.high
    assert hits / 2000 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_limits():
    assert Limit.parse("ttft=3") == Limit("ttft", 3.0)
    assert Limit.parse("tpot=250ms") == Limit("tpot", 0.25)
    assert Limit.parse(" E2E=20s") == Limit("e2e", 20.0)
    for bad in ("ttft", "ttft=", "itl=3", "ttft=-1", "ttft=0", "ttft=nan", "ttft=inf", "ttft=3m"):
        with pytest.raises(UsageError):
            Limit.parse(bad)


def test_a_late_generator_says_so():
    """Sent half a second after it was due, of a TTFT of one."""
    seen = tuple(replace(each, sent=each.scheduled + 0.5) for each in (whole(n) for n in range(100)))
    found = figures(Run(seen, 10.0))
    assert found.late() and "The generator itself was late" in told(found)
    assert found.delay.value("p99") == pytest.approx(0.5)
    punctual = figures(Run(tuple(whole(n) for n in range(100)), 10.0))
    assert not punctual.late() and "late" not in told(punctual).split("\n\n")[-2]


def test_what_is_told_has_the_formulas():
    text = told(figures(Run((whole(0), whole(1)), 10.0), [Limit("ttft", 0.5)]))
    assert "TPOT = (last − first) / (tokens − 1)" in text
    assert "0.0% of all within ttft ≤ 0.5 s (missed: ttft 2, failures 0)" in text


def test_the_record_has_every_request(tmp_path):
    record = Record(tmp_path / "r.jsonl", [Limit("ttft", 2)])
    record(Run((whole(0), whole(1, outcome="failed", reason="no")), 10.0, rate=2.0))
    record(Run((whole(0, first=3.0),), 10.0, clients=4))
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["good"] for row in rows] == [True, False, False]
    assert [(row["rate"], row["clients"]) for row in rows] == [(2.0, None), (2.0, None), (None, 4)]
    assert rows[0]["ttft"] == 1.0 and rows[0]["tpot"] == pytest.approx(0.1) and rows[1]["ttft"] is None
    with pytest.raises(UsageError, match="cannot be written"):
        Record(tmp_path / "no" / "r.jsonl")
