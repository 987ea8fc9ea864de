"""What a figure over several seeds is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Two-sided 97.5 % quantiles of Student's t by degrees of freedom; the normal's beyond.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL_QUANTILE = 1.960
_WILSON_Z = 1.959964


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
        quantile = _T_QUANTILES[freedom - 1] if freedom <= len(_T_QUANTILES) else _NORMAL_QUANTILE
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `samples` independent trials."""
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    z2 = _WILSON_Z**2 / samples
    centre = (share + z2 / 2) / (1 + z2)
    half = _WILSON_Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    return max(0.0, centre - half), min(1.0, centre + half)
