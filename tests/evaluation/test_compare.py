from __future__ import annotations

import pytest
from scipy.stats import binomtest

from fastsds.evaluation import Figure, Outcomes, bootstrap_interval, compare


def _outcomes(hits: dict[str, int], groups: tuple[str, ...] | None = None, benchmark: str = "toy") -> Outcomes:
    return Outcomes(benchmark, {"accuracy": Figure(tuple(hits.values()), tuple(hits), groups, 0.5)})


def test_gains_and_losses_are_counted_on_the_same_samples() -> None:
    before = _outcomes({"a": 1, "b": 0, "c": 0, "d": 0, "e": 1, "f": 0})
    after = _outcomes({"f": 1, "e": 0, "d": 1, "c": 1, "b": 0, "a": 1})  # in another order
    row = compare(before, after).figures["accuracy"]
    assert (row.samples, row.gained, row.lost) == (6, 3, 1)
    assert (row.before, row.after) == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert row.difference == pytest.approx(2 / 6)
    assert row.p_value == pytest.approx(binomtest(3, 4).pvalue)
    assert row.low < 0 < row.difference < row.high  # four samples that differ decide nothing
    assert row.macro_difference is None


def test_macro_is_compared_over_the_same_groups() -> None:
    groups = ("on", "on", "on", "under")
    before = _outcomes({"a": 0, "b": 0, "c": 1, "d": 1}, groups)
    after = _outcomes({"a": 1, "b": 1, "c": 1, "d": 0}, groups)
    row = compare(before, after).figures["accuracy"]
    assert row.difference == pytest.approx(1 / 4)
    assert row.macro_before == pytest.approx((1 / 3 + 1) / 2)
    assert row.macro_after == pytest.approx((1 + 0) / 2)
    assert row.macro_difference == pytest.approx((2 / 3 - 1) / 2)
    # `under` has one sample, which is always drawn: only `on` moves, by thirds
    assert row.macro_low == pytest.approx((0 - 1) / 2) and row.macro_high == pytest.approx((1 - 1) / 2)


def test_a_model_differs_from_itself_in_nothing() -> None:
    outcomes = _outcomes({"a": 1, "b": 0, "c": 1})
    row = compare(outcomes, outcomes).figures["accuracy"]
    assert (row.difference, row.low, row.high, row.gained, row.lost, row.p_value) == (0, 0, 0, 0, 0, 1)


def test_pairing_narrows_the_interval() -> None:
    """100 samples, 50 right before; after, five more: unpaired the interval would hold zero by far."""
    before = _outcomes({str(row): int(row < 50) for row in range(100)})
    after = _outcomes({str(row): int(row < 58) for row in range(100)})
    row = compare(before, after).figures["accuracy"]
    assert 0 < row.low < row.difference < row.high < 0.15
    assert row.p_value == pytest.approx(2 / 2**8)


def test_samples_of_one_unit_count_once() -> None:
    """Ten examples of two images: both images of eight examples are gained, one image of one is lost."""
    keys = tuple(f"{example} image {side}" for example in range(10) for side in (0, 1))
    units = tuple(str(example) for example in range(10) for _ in (0, 1))
    earlier, later = [0] * 16 + [1, 1] + [1, 0], [1] * 16 + [0, 1] + [0, 1]
    before, after = (
        Outcomes("toy", {"pair": Figure(tuple(hits), keys, None, 0.5, units)}) for hits in (earlier, later)
    )
    row = compare(before, after).figures["pair"]
    assert (row.samples, row.gained, row.lost) == (20, 17, 2)
    assert row.p_value == pytest.approx(binomtest(8, 9).pvalue)  # the last example gains as much as it loses
    differences = [second - first for first, second in zip(earlier, later, strict=True)]
    assert (row.low, row.high) == bootstrap_interval(differences, None, units) != bootstrap_interval(differences)
    other = Outcomes("toy", {"pair": Figure(tuple(later), keys, None, 0.5)})
    with pytest.raises(ValueError, match="units: expected those of pair to be the same; "):
        compare(before, other)


def test_a_seed_gives_the_same_interval() -> None:
    before = _outcomes({str(row): row % 2 for row in range(40)})
    after = _outcomes({str(row): row % 3 % 2 for row in range(40)})
    first, again = (compare(before, after, seed=1).figures["accuracy"] for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            _outcomes({"a": 1, "x": 0, "y": 0, "z": 1, "w": 1}),
            r"keys: .* of accuracy in both, only the first has 2 \(b, c\) and only the second 4 \(w, x, y, …\); ",
        ),
        (_outcomes({"a": 1, "b": 0}), r"only the first has 1 \(c\) and only the second none"),
        (_outcomes({"a": 1, "b": 0, "c": 1}, benchmark="aro"), "benchmark: expected the same of both, got 'toy' and"),
        (_outcomes({"a": 1, "b": 0, "c": 1}, ("x", "x", "y")), "groups: expected those of accuracy to be the same; "),
        (Outcomes("toy", {"text": Figure((1,), ("a",))}), "figures: expected the same of both, only one has accuracy"),
    ],
)
def test_what_cannot_be_compared_is_said(after: Outcomes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(_outcomes({"a": 1, "b": 0, "c": 1}), after)
