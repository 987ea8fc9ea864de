"""What a figure over several seeds is worth."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# 97.5 % quantiles of Student's t by degrees of freedom, of a two-sided 95 % interval.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z = 1.959964  # the normal's


def summarise(values: Sequence[float], samples: int) -> dict[str, Any]:
    """Mean and 95 % interval of a share in [0, 1] measured with one or several seeds.

    Several seeds: Student's t interval over the seeds. One seed: Wilson's interval of the share over its `samples`,
    which tells the test set's part of the uncertainty and not the training's.

    Returns:
        `{"mean", "low", "high", "values"}`, the bounds clipped to [0, 1].

    Raises:
        ValueError: no values, or a value outside [0, 1].
    """
    if not values or any(not 0 <= value <= 1 for value in values):
        raise ValueError(f"values: expected shares in [0, 1], at least one, got {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        low, high = wilson_interval(mean, samples)
    else:
        freedom = len(values) - 1
        half = _t_quantile(freedom) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def wilson_interval(share: float, samples: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `samples` independent trials."""
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    z2 = _Z**2 / samples
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def _t_quantile(freedom: int) -> float:
    if freedom <= len(_T_QUANTILES):
        return _T_QUANTILES[freedom - 1]
    # Cornish-Fisher expansion about the normal's quantile; right to 2e-4 from here on.
    first, second = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384
    return _Z + first / freedom + second / freedom**2 + third / freedom**3


def share_interval(
    hits: Sequence[float], groups: Sequence[str] | None = None, units: Sequence[str] | None = None
) -> tuple[float, float]:
    """95 % interval of a share: `bootstrap_interval`, or Wilson's where that is a point, as where all are right.

    Wilson's is then of the effective number of trials (Kish, 1965): `1 / sum(weight^2)` over the units, whose weights
    in the mean sum to 1; without groups and units that is the number of hits.
    """
    low, high = bootstrap_interval(hits, groups, units)
    if high - low > 1e-9:
        return low, high
    group_of: Sequence[str] = [""] * len(hits) if groups is None else groups
    unit_of: Sequence[object] = range(len(hits)) if units is None else units
    sizes, weights = Counter(group_of), dict[object, float]()
    for group, unit in zip(group_of, unit_of, strict=True):
        weights[unit] = weights.get(unit, 0.0) + 1 / (len(sizes) * sizes[group])
    return wilson_interval(low, max(1.0, 1 / math.fsum(weight**2 for weight in weights.values())))


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron, 1979).

    It knows no more than the values: where they are all alike it is a point (`share_interval` is not), and a group of
    one sample or unit adds nothing to its width.

    Args:
        values: one per sample: hits, or differences of two models' hits.
        groups: the mean is that of the groups' means where given; samples are then resampled within their group.
        units: samples of one unit depend on each other, and are drawn together; each its own by default. Where there
            are groups, those of one unit in one group.
        resamples: how often the units are drawn again, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: no values, another number of groups or units, or a confidence outside (0, 1).
    """
    for name, column in (("groups", groups), ("units", units)):
        if column is not None and len(column) != len(values):
            raise ValueError(f"{name}: expected one for each of {len(values)} values, got {len(column)}")
    if not values or not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"values, confidence, resamples: expected at least one, inside (0, 1) and at least 1, got {len(values)}, "
            f"{confidence} and {resamples}"
        )
    unit = np.arange(len(values)) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]
    group = np.zeros_like(unit) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    drawn_as, at = np.unique(group * len(values) + unit, return_inverse=True)
    sums, sizes = np.bincount(at, weights=np.asarray(values, dtype=float)), np.bincount(at)
    group_of = drawn_as // len(values)
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for number in range(group_of.max() + 1):
        members = np.stack([sums, sizes], axis=1)[group_of == number]
        # How often each distinct unit is drawn says it all: a handful of numbers and not one per sample.
        distinct, counts = np.unique(members, axis=0, return_counts=True)
        drawn = rng.multinomial(len(members), counts / len(members), size=resamples)
        means += (drawn @ distinct[:, 0]) / (drawn @ distinct[:, 1])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means / (group_of.max() + 1), [tail, 1 - tail])
    return float(low), float(high)


def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: are gains and losses equally likely?

    The binomial test with 1/2 of the samples on which two models differ; 1 where they differ on none.

    Args:
        gained: samples that only the second model has right.
        lost: samples that only the first model has right.

    Raises:
        ValueError: a negative count.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"gained, lost: expected counts, got {gained} and {lost}")
    trials = gained + lost
    term = tail = 1  # binomial coefficients, exact
    for successes in range(min(gained, lost)):
        term = term * (trials - successes) // (successes + 1)
        tail += term
    return min(1.0, 2 * tail / 2**trials)
