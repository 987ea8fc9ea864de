from __future__ import annotations

import pytest
from scipy import stats

from fastsds.evaluation import summarise, wilson_interval


@pytest.mark.parametrize("seeds", [2, 3, 5, 11, 12, 13, 20, 40])
def test_several_seeds_give_students_interval(seeds: int) -> None:
    values = [0.5 + 0.1 * (-1) ** seed * (seed / seeds) for seed in range(seeds)]
    mean = sum(values) / seeds
    low, high = stats.t.interval(0.95, seeds - 1, loc=mean, scale=stats.sem(values))
    found = summarise(values, samples=100)
    assert found["mean"] == pytest.approx(mean)
    assert found["values"] == values
    # bounds of two seeds reach outside, and are clipped
    assert found["low"] == pytest.approx(max(low, 0), abs=2e-4)
    assert found["high"] == pytest.approx(min(high, 1), abs=2e-4)


@pytest.mark.parametrize(("right", "samples"), [(0, 10), (3, 10), (10, 10), (171, 400), (1, 1)])
def test_one_seed_gives_wilsons_interval(right: int, samples: int) -> None:
    expected = stats.binomtest(right, samples).proportion_ci(method="wilson")
    assert wilson_interval(right / samples, samples) == pytest.approx((expected.low, expected.high), abs=1e-7)
    found = summarise([right / samples], samples)
    assert (found["mean"], found["values"]) == (right / samples, [right / samples])
    assert (found["low"], found["high"]) == wilson_interval(right / samples, samples)


@pytest.mark.parametrize(("values", "low", "high"), [([0.99, 1.0, 0.9], None, 1.0), ([0.0, 0.1, 0.01], 0.0, None)])
def test_bounds_are_clipped_to_shares(values: list[float], low: float | None, high: float | None) -> None:
    found = summarise(values, samples=100)
    assert low is None or found["low"] == low
    assert high is None or found["high"] == high
    assert 0 <= found["low"] < found["mean"] < found["high"] <= 1


def test_equal_values_have_no_spread() -> None:
    found = summarise([0.25, 0.25, 0.25], samples=8)
    assert found["low"] == found["mean"] == found["high"] == 0.25


@pytest.mark.parametrize("values", [[], [1.1], [0.5, -0.1], [float("nan")], [0.5, float("inf")]])
def test_values_that_are_no_shares_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"values: expected shares in \[0, 1\], at least one, got \["):
        summarise(values, samples=10)


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"samples: expected at least 1, got {samples}"):
        wilson_interval(0.5, samples)
