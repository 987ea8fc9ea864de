"""Base-to-novel accuracy on a model whose logits can be read off its images."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsds.evaluation import BaseToNovelScores, base_to_novel, classification_accuracy, summarise_base_to_novel


class Readable(nn.Module):
    """The logits of an image are the first numbers of it, one per class."""

    def __init__(self, classnames: Sequence[str]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.classnames = tuple(classnames)
        self.modes: list[bool] = []

    def for_classes(self, classnames: Sequence[str]) -> Readable:
        other = copy.copy(self)
        other.classnames = tuple(classnames)
        return other

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images[:, : len(self.classnames)] + self.anchor


def _batches(rows: list[list[float]], labels: list[int], size: int = 2) -> list[dict[str, Tensor]]:
    images, targets = torch.tensor(rows).split(size), torch.tensor(labels).split(size)
    return [{"images": one, "labels": target} for one, target in zip(images, targets, strict=True)]


BASE = _batches([[3, 1, 0], [0, 2, 1], [1, 0, 2], [9, 0, 1], [5, 5, 0]], [0, 1, 2, 1, 0])  # 3 of 5: one wrong, one tie
NOVEL = _batches([[1, 0, 9], [0, 1, 9], [1, 0, 9], [1, 0, 9]], [0, 1, 0, 1])  # 3 of 4 among two classes


def test_each_half_is_measured_among_its_own_classes() -> None:
    model = Readable(["a", "b", "c"])
    scores = base_to_novel(model, BASE, NOVEL, ["d", "e"])
    assert scores == BaseToNovelScores(base=3 / 5, novel=3 / 4)
    assert scores.harmonic == pytest.approx(statistics.harmonic_mean([3 / 5, 3 / 4]))
    assert model.classnames == ("a", "b", "c")


def test_the_harmonic_mean_of_nothing_is_nothing() -> None:
    assert BaseToNovelScores(0.0, 0.0).harmonic == 0
    assert BaseToNovelScores(0.0, 1.0).harmonic == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_wrong_answers(bad: float) -> None:
    with pytest.raises(ValueError, match="logits: expected finite values, got 1 that are not"):
        classification_accuracy(Readable(["a", "b"]), _batches([[0.0, 1.0], [bad, 1.0]], [1, 1]))


def test_models_are_measured_in_evaluation_mode_and_left_as_they_were() -> None:
    model = Readable(["a", "b", "c"]).train()
    classification_accuracy(model, BASE)
    assert model.modes == [False] * 3
    assert model.training


def test_seeds_are_averaged_after_the_harmonic_mean() -> None:
    runs = [BaseToNovelScores(0.9, 0.5), BaseToNovelScores(0.6, 0.6), BaseToNovelScores(0.3, 0.9)]
    summary = summarise_base_to_novel(runs, samples=100)
    assert summary["harmonic"]["mean"] == pytest.approx(statistics.fmean(run.harmonic for run in runs))
    values = [run.base for run in runs]
    half = 4.303 * statistics.stdev(values) / 3**0.5  # Student's t at 2 degrees of freedom
    assert summary["base"]["high"] == pytest.approx(min(1, 0.6 + half), abs=1e-3)
    assert summary["novel"]["values"] == [0.5, 0.6, 0.9]


def test_classes_in_both_halves_are_named() -> None:
    with pytest.raises(ValueError, match="novel_classnames: expected classes that are not base, got 'b', 'c'"):
        base_to_novel(Readable(["a", "b", "c"]), BASE, NOVEL, ["c", "b", "d"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: expected at least one image, got none"),
        (_batches([[0, 1, 2]], [3]), "labels: expected positions below 3, the model's classes, got 3 to 3"),
        (_batches([[0, 1, 2]], [-1]), "labels: expected positions below 3, the model's classes, got -1 to -1"),
    ],
)
def test_unusable_batches_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_accuracy(Readable(["a", "b", "c"]), batches)
