"""Arrivals: the same for the same seed, and Poisson."""

import math
import statistics

import pytest

from lightship.bench.schedule import poisson
from lightship.errors import UsageError


def test_the_same_seed_gives_the_same_times():
    assert poisson(5, 3, count=100) == poisson(5, 3, count=100)
    assert poisson(5, 3, count=100) != poisson(5, 4, count=100)


def test_the_rate_only_scales_them():
    slow, fast = poisson(1, 3, count=100), poisson(4, 3, count=100)
    assert fast.times == pytest.approx([at / 4 for at in slow.times])


def test_gaps_are_exponential():
    """Mean 1/rate, standard deviation the same, and P(gap > mean) = 1/e, each within 4 standard errors."""
    n, rate = 20_000, 8.0
    times = poisson(rate, 0, count=n).times
    gaps = [after - before for before, after in zip((0.0, *times), times, strict=False)]
    error = 1 / rate / math.sqrt(n)
    assert abs(statistics.fmean(gaps) - 1 / rate) < 4 * error
    assert abs(statistics.stdev(gaps) - 1 / rate) < 4 * math.sqrt(2) * error
    share = sum(gap > 1 / rate for gap in gaps) / n
    assert abs(share - math.exp(-1)) < 4 * math.sqrt(math.exp(-1) * (1 - math.exp(-1)) / n)


def test_counts_are_poisson():
    """Variance of the arrivals a second equals their mean: no more regular and no more bursty than that."""
    times = poisson(5, 1, seconds=4000).times
    counts = [0] * 4000
    for at in times:
        counts[int(at)] += 1
    ratio = statistics.variance(counts) / statistics.fmean(counts)
    assert abs(ratio - 1) < 4 * math.sqrt(2 / 4000)


def test_bounds():
    assert len(poisson(10, 0, warmup=3, count=20).times) == 23
    both = poisson(10, 0, warmup=3, count=20, seconds=1)
    assert 3 < len(both.times) < 23 and both.warmup == 3
    assert both.opens == both.times[2] and all(at < both.opens + 1 for at in both.times)
    assert poisson(10, 0, warmup=3, count=20, seconds=1000).times == poisson(10, 0, warmup=3, count=20).times


def test_one_request_comes_however_late():
    """Where a sweep would otherwise end without it."""
    (late,) = poisson(0.1, 0, seconds=0.001, one=True).times
    assert late == poisson(0.1, 0, count=1).times[0] > 0.001
    assert poisson(0.1, 0, warmup=2, seconds=0.001, one=True).times == poisson(0.1, 0, count=3).times
    assert poisson(10, 0, seconds=5, one=True) == poisson(10, 0, seconds=5)


def test_a_schedule_needs_an_end_and_a_request():
    with pytest.raises(UsageError):
        poisson(1, 0)
    with pytest.raises(UsageError, match="none is due within"):
        poisson(0.1, 0, seconds=0.001)
