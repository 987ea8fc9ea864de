"""Two models on the same samples: before and after a distillation, say."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fastsds.data.files import first_names
from fastsds.evaluation.outcomes import Figure, Outcomes
from fastsds.evaluation.statistics import bootstrap_interval, exact_mcnemar


@dataclass(frozen=True)
class FigureComparison:
    """One figure of two models. Shares are in [0, 1]; differences are after minus before."""

    samples: int
    before: float
    after: float
    difference: float
    low: float
    """Lower end of the difference's 95 % bootstrap interval; samples are resampled in pairs."""
    high: float
    gained: int
    """Samples that only the second model has right."""
    lost: int
    """Samples that only the first model has right."""
    p_value: float
    """McNemar's exact test, two-sided; where samples depend on each other, of their units by sign."""
    macro_before: float | None = None
    macro_after: float | None = None
    macro_difference: float | None = None
    macro_low: float | None = None
    macro_high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Every figure of a benchmark for two models."""

    benchmark: str
    figures: dict[str, FigureComparison]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(before: Outcomes, after: Outcomes, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compares two models' outcomes of one benchmark sample by sample.

    Args:
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: another benchmark, other figures, or other samples or groups of a figure; the message counts the
            samples that only one of the two has, and names the first.
    """
    if before.benchmark != after.benchmark:
        raise ValueError(f"benchmark: expected the same of both, got {before.benchmark!r} and {after.benchmark!r}")
    different = sorted(before.figures.keys() ^ after.figures.keys())
    if different:
        raise ValueError(f"figures: expected the same of both, only one has {', '.join(different)}")
    return Comparison(
        after.benchmark,
        {name: _compare(name, before.figures[name], figure, resamples, seed) for name, figure in after.figures.items()},
    )


def _compare(name: str, before: Figure, after: Figure, resamples: int, seed: int) -> FigureComparison:
    earlier = dict(zip(before.keys, before.hits, strict=True))
    _check_same(name, before.keys, after.keys)
    for column in ("groups", "units"):
        first, second = (dict(zip(one.keys, getattr(one, column) or (), strict=False)) for one in (before, after))
        if first != second:
            raise ValueError(f"{column}: expected those of {name} to be the same; evaluate both on the same files")
    differences = [hit - earlier[key] for key, hit in zip(after.keys, after.hits, strict=True)]
    low, high = bootstrap_interval(differences, None, after.units, resamples=resamples, seed=seed)
    by_unit = Counter[str]()
    for unit, difference in zip(after.units or after.keys, differences, strict=True):
        by_unit[unit] += int(difference)
    signs = list(by_unit.values())
    p_value = exact_mcnemar(sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs))
    macro: dict[str, float] = {}
    if before.macro is not None and after.macro is not None:
        macro_low, macro_high = bootstrap_interval(
            differences, after.groups, after.units, resamples=resamples, seed=seed
        )
        macro = {
            "macro_before": before.macro,
            "macro_after": after.macro,
            "macro_difference": after.macro - before.macro,
            "macro_low": macro_low,
            "macro_high": macro_high,
        }
    return FigureComparison(
        len(differences), before.micro, after.micro, after.micro - before.micro, low, high,
        differences.count(1), differences.count(-1), p_value, **macro,
    )  # fmt: skip


def _check_same(name: str, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    only_before, only_after = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    if not only_before and not only_after:
        return

    def tell(keys: list[str]) -> str:
        return f"{len(keys)} ({first_names(keys)})" if keys else "none"

    raise ValueError(
        f"keys: expected the same samples of {name} in both, only the first has {tell(only_before)} and only the "
        f"second {tell(only_after)}; evaluate both on the same files"
    )
