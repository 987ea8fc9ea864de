from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from fastsds.evaluation import bootstrap_interval, exact_mcnemar, share_interval, summarise, wilson_interval


@pytest.mark.parametrize("seeds", [2, 3, 5, 11, 12, 13, 20, 40])
def test_several_seeds_give_students_interval(seeds: int) -> None:
    values = [0.5 + 0.1 * (-1) ** seed * (seed / seeds) for seed in range(seeds)]
    mean = sum(values) / seeds
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, seeds - 1, loc=mean, scale=error)
    found = summarise(values, samples=100)
    assert found["mean"] == pytest.approx(mean)
    assert found["values"] == values
    # bounds of two seeds reach outside, and are clipped
    assert found["low"] == pytest.approx(max(low, 0), abs=5e-4 * error)
    assert found["high"] == pytest.approx(min(high, 1), abs=5e-4 * error)


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


@pytest.mark.parametrize("hits", [[1] * 60 + [0] * 40, [1] * 3 + [0] * 9, [1, 0, -1, 1, 0, 0, 1, -1, 0, 1] * 8])
def test_bootstrap_agrees_with_scipys(hits: list[float]) -> None:
    low, high = bootstrap_interval(hits, resamples=20_000, seed=1)
    expected = stats.bootstrap(
        (np.array(hits, dtype=float),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=1.01 / len(hits))


def test_macro_bootstrap_resamples_within_groups() -> None:
    rng = np.random.default_rng(0)
    groups = {"on": rng.random(30) < 0.9, "under": rng.random(80) < 0.3, "behind": rng.random(11) < 0.6}
    values = [float(hit) for members in groups.values() for hit in members]
    names = [name for name, members in groups.items() for _ in members]
    order = rng.permutation(len(values))
    low, high = bootstrap_interval([values[at] for at in order], [names[at] for at in order], resamples=20_000)

    def macro(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([np.mean(sample, axis=axis) for sample in samples], axis=0)

    expected = stats.bootstrap(
        tuple(np.asarray(members, dtype=float) for members in groups.values()), macro, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx(tuple(expected), abs=0.004)
    micro = bootstrap_interval(values)
    assert abs(micro[0] - low) > 0.05  # another mean, another interval


def test_bootstrap_has_its_coverage() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        low, high = bootstrap_interval((rng.random(100) < 0.7).astype(float).tolist(), resamples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 400 <= 0.98  # 95 %, and four standard errors of a percentile interval of 100 samples


def test_units_are_drawn_whole() -> None:
    """Against scipy's bootstrap of the units' means, which are of equal size; order and names do not matter."""
    rng = np.random.default_rng(7)
    table = (rng.random((80, 1)) < rng.random((80, 4)) * 0.3 + 0.4 * (rng.random((80, 1)) < 0.5)).astype(float)
    order = rng.permutation(320)
    values, units = table.ravel()[order].tolist(), [f"unit {at // 4}" for at in order]
    low, high = bootstrap_interval(values, None, units, resamples=20_000)
    expected = stats.bootstrap(
        (table.mean(axis=1),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(8)
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.004)
    alone = bootstrap_interval(values, resamples=20_000)
    assert high - low > 1.2 * (alone[1] - alone[0])  # samples that depend on each other say less


def test_units_that_cross_groups_are_drawn_whole_within_each() -> None:
    """Two images, each with two samples of `on` and two of `under`."""
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    groups, units = ["on"] * 4 + ["under"] * 4, ["a", "a", "b", "b"] * 2
    together = bootstrap_interval(values, groups, units, confidence=0.9, resamples=20_000)
    assert together == (0, 1)  # either group's mean is 0 in 1 of 4 draws, both in 1 of 16
    assert bootstrap_interval(values, groups, confidence=0.9, resamples=20_000) == (0.25, 0.75)


def test_units_of_unequal_size_weigh_by_their_samples() -> None:
    low, high = bootstrap_interval([1.0, 1.0, 1.0, 0.0], None, ["a", "a", "a", "b"], confidence=0.4)
    assert (low, high) == (0.75, 0.75)  # of the four equally likely draws two have both units
    assert bootstrap_interval([1.0, 1.0, 1.0, 0.0], None, ["a", "a", "a", "b"], confidence=0.99) == (0, 1)


@pytest.mark.parametrize("hit", [0, 1])
def test_samples_that_are_all_alike_have_wilsons_interval(hit: int) -> None:
    expected = stats.binomtest(40 * hit, 40).proportion_ci(method="wilson")
    assert share_interval([float(hit)] * 40) == pytest.approx((expected.low, expected.high), abs=1e-7)
    units = [f"image {row % 10}" for row in range(40)]
    assert share_interval([float(hit)] * 40, None, units) == pytest.approx(wilson_interval(hit, 10))


def test_groups_that_are_all_right_count_by_their_weight() -> None:
    """The mean of two groups' means, of 2 and 6 samples, varies as that of 6 samples: (p q / 2 + p q / 6) / 4."""
    groups = ["a"] * 2 + ["b"] * 6
    assert share_interval([1.0] * 8, groups) == pytest.approx(wilson_interval(1, 6))
    assert share_interval([1.0] * 49, [str(row) for row in range(49)], ["one"] * 49) == pytest.approx(
        wilson_interval(1, 1)
    )


def test_other_shares_have_the_bootstraps_interval() -> None:
    hits, groups, units = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], ["a"] * 4 + ["b"] * 2, ["u", "u", "v", "w", "x", "y"]
    assert share_interval(hits) == bootstrap_interval(hits)
    assert share_interval(hits, groups, units) == bootstrap_interval(hits, groups, units)


def test_bootstrap_follows_its_seed_and_confidence() -> None:
    hits = [1.0, 0.0] * 25
    assert bootstrap_interval(hits, seed=3) == bootstrap_interval(hits, seed=3)
    low, high = bootstrap_interval(hits, confidence=0.5)
    wide_low, wide_high = bootstrap_interval(hits, confidence=0.99)
    assert wide_low < low < 0.5 < high < wide_high
    assert bootstrap_interval([1.0] * 4) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, r"values, confidence, resamples: expected at least one, .* got 0, 0.95 and 2000"),
        (([1.0, 0.0], ["on"]), {}, "groups: expected one for each of 2 values, got 1"),
        (([1.0, 0.0], None, ["a"] * 3), {}, "units: expected one for each of 2 values, got 3"),
        (([1.0],), {"confidence": 1.0}, "got 1, 1.0 and 2000"),
        (([1.0],), {"resamples": 0}, "got 1, 0.95 and 0"),
    ],
)
def test_bootstrap_names_what_is_wrong(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*arguments, **options)


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (0, 7), (5, 5), (3, 4), (12, 3), (40, 61), (500, 431), (9000, 8800)]
)
def test_mcnemars_test_is_the_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert exact_mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemars_test_takes_counts() -> None:
    with pytest.raises(ValueError, match="gained, lost: expected counts, got 1 and -1"):
        exact_mcnemar(1, -1)
