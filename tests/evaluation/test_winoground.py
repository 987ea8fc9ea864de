from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from fastsds.evaluation import WinogroundScores, winoground_scores, winoground_similarity
from fastsds.evaluation.winoground import prefers_own_caption


def _table(c0i0: float, c0i1: float, c1i0: float, c1i1: float) -> torch.Tensor:
    """`[1, caption, image]`."""
    return torch.tensor([[[c0i0, c0i1], [c1i0, c1i1]]])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (_table(0.9, 0.1, 0.2, 0.8), WinogroundScores(pair=1, text=1, image=1, group=1)),
        (_table(0.1, 0.9, 0.8, 0.2), WinogroundScores(pair=0, text=0, image=0, group=0)),
        # caption 1 is similar to everything: each caption finds its image, image 0 does not find its caption
        (_table(0.3, 0.1, 0.5, 0.9), WinogroundScores(pair=0.5, text=0, image=1, group=0)),
        # image 1 is similar to everything: each image finds its caption, caption 0 does not find its image
        (_table(0.3, 0.5, 0.1, 0.9), WinogroundScores(pair=1, text=1, image=0, group=0)),
    ],
)
def test_scores_of_one_example(table: torch.Tensor, expected: WinogroundScores) -> None:
    assert winoground_scores(table) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (_table(0.5, 0.1, 0.5, 0.9), WinogroundScores(pair=0.5, text=0, image=1, group=0)),  # s(c0,i0) = s(c1,i0)
        (_table(0.9, 0.5, 0.1, 0.5), WinogroundScores(pair=0.5, text=0, image=1, group=0)),  # s(c1,i1) = s(c0,i1)
        (_table(0.5, 0.5, 0.1, 0.9), WinogroundScores(pair=1, text=1, image=0, group=0)),  # s(c0,i0) = s(c0,i1)
        (_table(0.9, 0.1, 0.5, 0.5), WinogroundScores(pair=1, text=1, image=0, group=0)),  # s(c1,i1) = s(c1,i0)
        (_table(0.5, 0.5, 0.5, 0.5), WinogroundScores(pair=0, text=0, image=0, group=0)),
    ],
)
def test_a_tie_in_any_comparison_is_wrong(table: torch.Tensor, expected: WinogroundScores) -> None:
    assert winoground_scores(table) == expected


def test_shares_are_over_examples() -> None:
    right, wrong = _table(0.9, 0.1, 0.2, 0.8), _table(0.1, 0.9, 0.8, 0.2)
    text_only, image_only = _table(0.3, 0.5, 0.1, 0.9), _table(0.3, 0.1, 0.5, 0.9)
    scores = winoground_scores(torch.cat([right, wrong, text_only, text_only, image_only]))
    assert scores.to_json() == pytest.approx({"pair": 7 / 10, "text": 3 / 5, "image": 2 / 5, "group": 1 / 5})


def test_orders_of_four_values_give_the_chance_that_is_documented() -> None:
    """Of the 24 orders of four similarities, every one as likely as any other without skill."""
    from itertools import permutations

    tables = torch.cat([_table(*order) for order in permutations((0.1, 0.2, 0.3, 0.4))])
    expected = {"pair": 1 / 2, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
    assert winoground_scores(tables).to_json() == pytest.approx(expected)


def test_preference_of_each_image_against_the_definition() -> None:
    values = (0.1, 0.2, 0.3)
    for table in (_table(*cells) for cells in product(values, repeat=4)):
        (c0i0, c0i1), (c1i0, c1i1) = table[0].tolist()
        assert prefers_own_caption(table)[0].tolist() == [c0i0 > c1i0, c1i1 > c0i1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="similarity: expected finite values"):
        winoground_scores(_table(value, 0.1, 0.2, 0.3))


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2), (3, 2, 3), (3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected \[examples, 2, 2\] with examples, got \[{shape[0]}, "):
        winoground_scores(torch.zeros(shape))


def test_similarity_is_by_example_caption_and_image(stub_clip: Any) -> None:
    clip = stub_clip({"x": [2.0, 0.0, 0.0], "y": [0.0, 3.0, 0.0], "z": [0.0, 0.0, 1.0], "xy": [3.0, 4.0, 0.0]})
    images = torch.tensor([[[0.6, 0.8, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 7.0], [0.0, 6.0, 8.0]]]).view(2, 2, 3, 1, 1)
    similarity = winoground_similarity(clip, clip.tokenizer, images, [("x", "y"), ("z", "xy")])
    expected = torch.tensor([
        [[0.6, 1.0], [0.8, 0.0]],  # x with both images of the first example, then y
        [[1.0, 0.8], [0.0, 0.48]],  # z with both of the second, then xy
    ])  # fmt: skip
    torch.testing.assert_close(similarity, expected)
    # the first example's images have each other's captions
    assert winoground_scores(similarity) == WinogroundScores(pair=0.25, text=0, image=0.5, group=0)


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        (torch.zeros(2, 2, 3, 1, 1), [("x", "y")]),
        (torch.zeros(1, 3, 3, 1, 1), [("x", "y")]),
        (torch.zeros(1, 2, 3, 1, 1), [("x", "y", "x")]),
        (torch.zeros(1, 2, 3, 1, 1), [("x",)]),
    ],
)
def test_other_than_two_captions_for_two_images_are_refused(
    stub_clip: Any, images: torch.Tensor, captions: list[Any]
) -> None:
    clip = stub_clip({"x": [1.0, 0.0, 0.0], "y": [0.0, 1.0, 0.0]})
    message = rf"two for each of {len(images)} examples of two images, got 1 rows for images \[{len(images)}, "
    with pytest.raises(ValueError, match=message):
        winoground_similarity(clip, clip.tokenizer, images, captions)
