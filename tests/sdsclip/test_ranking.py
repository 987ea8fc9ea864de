from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from fastsds.sdsclip import batch_candidates, swap_phrases
from fastsds.sdsclip.ranking import hard_targets, ranking_loss, soft_targets


def test_soft_targets_against_numbers_by_hand() -> None:
    # exp(-score / T) of differences ln 2 and ln 4 at T = 1: 4 : 2 : 1
    scores = torch.tensor([[1.0, 1.0 + math.log(2), 1.0 + math.log(4)]])
    torch.testing.assert_close(soft_targets(scores, 1.0), torch.tensor([[4 / 7, 2 / 7, 1 / 7]]))
    # half the temperature squares the odds: 16 : 4 : 1
    torch.testing.assert_close(soft_targets(scores, 0.5), torch.tensor([[16 / 21, 4 / 21, 1 / 21]]))


def test_hard_targets_are_one_hot() -> None:
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(hard_targets(torch.tensor([2, 0]), 3), expected)


def _features(cosines: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the plane: images along the first axis, candidates at the given cosines to them."""
    cosine = torch.tensor(cosines, dtype=torch.float64)
    images = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(len(cosines), 1)
    return images, torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=-1)


def test_value_is_the_mean_kl_divergence() -> None:
    images, candidates = _features([[0.5, 0.25], [0.1, 0.9]])
    targets = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64)
    expected = 0.0
    for cosines, target in (((0.5, 0.25), (0.7, 0.3)), ((0.1, 0.9), (0.2, 0.8))):
        total = sum(math.exp(4 * cosine) for cosine in cosines)
        for cosine, share in zip(cosines, target, strict=True):
            expected += share * (math.log(share) - (4 * cosine - math.log(total))) / 2
    assert ranking_loss(images, candidates, scale, targets).item() == pytest.approx(expected, rel=1e-12)


def test_value_is_zero_at_agreement_and_positive_elsewhere() -> None:
    images, candidates = _features([[0.5, 0.25, -0.5]])
    weights = [math.exp(10 * cosine) for cosine in (0.5, 0.25, -0.5)]
    agreed = torch.tensor([[weight / sum(weights) for weight in weights]], dtype=torch.float64)
    scale = torch.tensor(10.0, dtype=torch.float64)
    assert ranking_loss(images, candidates, scale, agreed).item() == pytest.approx(0, abs=1e-14)
    assert ranking_loss(images, candidates, scale, agreed.flip(1)).item() > 0.1


def test_one_hot_targets_give_the_cross_entropy() -> None:
    images, candidates = _features([[0.5, 0.25], [0.1, 0.9]])
    scale = torch.tensor(3.0, dtype=torch.float64)
    logits = torch.tensor([[1.5, 0.75], [0.3, 2.7]], dtype=torch.float64)
    labels = torch.tensor([1, 1])
    value = ranking_loss(images, candidates, scale, hard_targets(labels, 2))
    torch.testing.assert_close(value, F.cross_entropy(logits, labels))


def test_gradient_pulls_the_image_to_the_candidate_that_the_teacher_prefers() -> None:
    image = torch.tensor([[1.0, 0.0]], requires_grad=True)
    candidates = torch.tensor([[[0.6, 0.8], [0.6, -0.8]]])  # equally similar
    # the second candidate has the lower score, so it is the better match
    targets = soft_targets(torch.tensor([[0.02, 0.01]]), temperature=0.005)
    ranking_loss(image, candidates, torch.tensor(10.0), targets).backward()
    step = -image.grad
    assert step[0] @ candidates[0, 1] > 0 > step[0] @ candidates[0, 0]


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("a red circle left of a blue square", "a blue square left of a red circle"),
        ("a dog on a mat", "a mat on a dog"),
        ("a dog on a mat.", "a mat on a dog."),
        ("a dog behind a cat!", "a cat behind a dog!"),
        ("  a dog near a cat ", "a cat near a dog"),
        ("A Dog Near A Cat", "A Cat Near A Dog"),
        ("a dog ON a mat", "a mat ON a dog"),
        ("a cup to the left of a plate", "a plate to the left of a cup"),
        ("a cup on top of a plate", "a plate on top of a cup"),
        ("a cup in front of a plate", "a plate in front of a cup"),
        ("a cup next to a plate", "a plate next to a cup"),
        ("a man in a hat on a horse", "a hat on a horse in a man"),  # the first connective
        ("a man holding a dog", "a dog holding a man"),
        ("a spoon within reach", None),  # no whole connective
        ("an overcast sky", None),
        ("a red circle", None),
        ("on a mat", None),  # nothing before
        ("a dog on", None),  # nothing after
        ("a cat near a cat", None),  # the same caption again
        ("", None),
    ],
)
def test_phrases_around_the_first_connective_are_exchanged(caption: str, swapped: str | None) -> None:
    assert swap_phrases(caption) == swapped


def test_connectives_can_be_given_and_are_taken_literally() -> None:
    assert swap_phrases("tea v.s. coffee", ["v.s."]) == "coffee v.s. tea"
    assert swap_phrases("tea vxsx coffee", ["v.s."]) is None
    assert swap_phrases("a dog on a mat", ["under"]) is None


def test_candidates_hold_their_own_caption_where_the_label_says() -> None:
    captions = ["one", "two", "three", "four", "two"]
    rows, labels = batch_candidates(captions, 3, random.Random(0))
    assert labels.dtype == torch.int64
    for caption, row, label in zip(captions, rows, labels.tolist(), strict=True):
        assert row[label] == caption
        assert len(set(row)) == len(row) == 3
        assert set(row) <= set(captions)


def test_the_position_of_the_own_caption_varies_and_follows_the_generator() -> None:
    captions = [str(number) for number in range(30)]
    rows, labels = batch_candidates(captions, 3, random.Random(0))
    assert set(labels.tolist()) == {0, 1, 2}
    again, _ = batch_candidates(captions, 3, random.Random(0))
    other, _ = batch_candidates(captions, 3, random.Random(1))
    assert again == rows and other != rows


@pytest.mark.parametrize(
    ("captions", "candidates", "most"), [(["a", "b", "a"], 3, 2), (["a", "b"], 1, 2), (["a", "a"], 2, 1), ([], 2, 0)]
)
def test_more_candidates_than_captions_are_refused(captions: list[str], candidates: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"candidates: expected 2 to {most}, .* in the batch, got {candidates}"):
        batch_candidates(captions, candidates, random.Random(0))
