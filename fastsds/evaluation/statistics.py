"""What a figure over several seeds is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

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


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
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
    # Cornish-Fisher expansion about the normal's quantile; right to 1e-3 from here on.
    first, second = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / freedom + second / freedom**2
