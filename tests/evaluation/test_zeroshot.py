from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor

from fastsds.data import DataError
from fastsds.evaluation import ClassifiedImages, ClipJudge, zero_shot_accuracy, zero_shot_outcomes

TABLE = {
    "a photo of red": [1.0, 0.0, 0.0],
    "a photo of green": [0.0, 1.0, 0.0],
    "a photo of blue": [0.0, 0.0, 1.0],
    "a photo of red too": [5.0, 0.0, 0.0],
}
NAMES = ["red", "green", "blue"]


def _images(*features: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(features, dtype=torch.float32).view(-1, 3, 1, 1)


@pytest.mark.parametrize(
    ("labels", "expected"), [([0, 1, 2, 1], 1.0), ([0, 1, 2, 0], 0.75), ([1, 2, 0, 0], 0.0), ([0, 0, 0, 0], 0.25)]
)
def test_accuracy_is_the_share_of_nearest_classes(stub_clip: Any, labels: list[int], expected: float) -> None:
    clip = stub_clip(TABLE)
    images = _images((3, 1, 0), (0, 1, 0.5), (0, 0.2, 0.9), (0.4, 0.5, 0))
    assert zero_shot_accuracy(clip, clip.tokenizer, images, torch.tensor(labels), NAMES) == expected


@pytest.mark.parametrize("label", [0, 1])
def test_a_tie_is_wrong_for_either_class(stub_clip: Any, label: int) -> None:
    clip = stub_clip(TABLE)
    images = _images((1, 1, 0), (0, 0, 1))
    assert zero_shot_accuracy(clip, clip.tokenizer, images, torch.tensor([label, 2]), NAMES) == 0.5


def test_classes_of_the_same_direction_are_a_tie(stub_clip: Any) -> None:
    clip = stub_clip(TABLE)
    names = ["red", "red too", "blue"]
    assert zero_shot_accuracy(clip, clip.tokenizer, _images((1, 0, 0)), torch.tensor([0]), names) == 0.0


def test_templates_are_averaged_as_unit_vectors(stub_clip: Any) -> None:
    clip = stub_clip({
        "one of a": [100.0, 0.0, 0.0],  # the long vector must not outweigh the other
        "two of a": [0.0, 1.0, 0.0],
        "one of b": [1.0, 0.0, 0.0],
        "two of b": [0.6, 0.0, 0.8],
    })  # fmt: skip
    # classes: a = (1, 1, 0) / sqrt 2, b = (2, 0, 1) / sqrt 5
    images = _images((0.6, 0.8, 0), (1, 0, 0), (1, 0.25, 0))
    labels = torch.tensor([0, 1, 1])
    templates = ("one of {}", "two of {}")
    assert zero_shot_accuracy(clip, clip.tokenizer, images, labels, ["a", "b"], templates) == 1.0
    assert zero_shot_accuracy(clip, clip.tokenizer, images, 1 - labels, ["a", "b"], templates) == 0.0


def test_the_mean_of_prompts_is_normalised(stub_clip: Any) -> None:
    """Without it a class whose prompts disagree would lose similarity to one whose prompts agree."""
    clip = stub_clip({
        "one of a": [0.6, 0.8, 0.0],
        "two of a": [0.6, -0.8, 0.0],  # the mean is (0.6, 0, 0)
        "one of b": [0.8, 0.0, 0.6],
        "two of b": [0.8, 0.0, 0.6],
    })  # fmt: skip
    templates = ("one of {}", "two of {}")
    assert zero_shot_accuracy(clip, clip.tokenizer, _images((1, 0, 0)), torch.tensor([0]), ["a", "b"], templates) == 1.0


def test_template_without_a_place_for_the_name_is_refused(stub_clip: Any) -> None:
    clip = stub_clip(TABLE)
    with pytest.raises(ValueError, match=r"templates: expected each to hold \{\} for the class name, got 'a photo'"):
        zero_shot_accuracy(clip, clip.tokenizer, _images((1, 0, 0)), torch.tensor([0]), NAMES, ("a {}", "a photo"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "labels: expected 2 positions below 3, got 2 from 0 to 3"),
        ([-1, 0], "labels: expected 2 positions below 3, got 2 from -1 to 0"),
        ([0], "labels: expected 2 positions below 3, got 1 from 0 to 0"),
        ([], "labels: expected 2 positions below 3, got 0$"),
    ],
)
def test_labels_that_are_not_positions_are_refused(stub_clip: Any, labels: list[int], message: str) -> None:
    clip = stub_clip(TABLE)
    images = _images((1, 0, 0), (0, 1, 0))
    with pytest.raises(ValueError, match=message):
        zero_shot_accuracy(clip, clip.tokenizer, images, torch.tensor(labels, dtype=torch.int64), NAMES)


def test_outcomes_average_to_the_accuracy(clip: Any, clip_tokenizer: Any) -> None:
    """Of a genuine model with its own tokenizer and several templates."""
    pictures = [to_pil_image(image) for image in torch.rand(30, 3, 32, 32)]
    labels = torch.randint(5, (30,))
    names, templates = ("red", "a dog", "blue", "x", "y z"), ("a photo of {}", "{} or so", "the {}.")
    data = ClassifiedImages(list(zip(pictures, labels.tolist(), strict=True)), tuple(map(str, range(30))), names)
    found = zero_shot_outcomes(ClipJudge(clip, to_tensor, clip_tokenizer, batch_size=7), data, templates)
    images = torch.stack([to_tensor(picture) for picture in pictures])
    expected = zero_shot_accuracy(clip, clip_tokenizer, images, labels, names, templates)
    assert found.figures["accuracy"].micro == pytest.approx(expected)
    assert 0 < expected < 1


def test_classes_of_one_name_are_one(colour_judge: Any) -> None:
    """Of open_clip's names for ImageNet two come twice; by their prompts such classes cannot be told apart."""
    pictures = [Image.new("RGB", (2, 2), colour) for colour in ("red", "red", "blue", "lime")]
    names, labels = ("red", "blue", "red", "green"), [0, 2, 1, 1]
    data = ClassifiedImages(list(zip(pictures, labels, strict=True)), tuple("abcd"), names)
    figure = zero_shot_outcomes(colour_judge(), data, ["a {} one"]).figures["accuracy"]
    assert figure.hits == (1, 1, 1, 0)
    assert figure.groups == ("red", "red", "blue", "blue") and figure.chance == 1 / 3
    clip = colour_judge().clip
    images = torch.stack([to_tensor(picture) for picture in pictures])
    assert zero_shot_accuracy(clip, clip.tokenizer, images, torch.tensor(labels), names, ["a {} one"]) == 3 / 4
    with pytest.raises(DataError, match="images: expected at least one, of at least two named classes, got 4 of 2: "):
        ClassifiedImages(data.images, data.keys, ("red", "red"))


def test_labels_and_similarities_are_checked(colour_judge: Any) -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    with pytest.raises(ValueError, match="images: expected labels below 2, got 0 to 2"):
        zero_shot_outcomes(
            colour_judge(), ClassifiedImages([(image, 0), (image, 2)], ("a", "b"), ("red", "blue")), ["a {} one"]
        )
    judge = colour_judge({"a broken one": [float("inf"), 0.0, 0.0]})
    with pytest.raises(ValueError, match="logits: expected finite values, got 1 that are not"):
        zero_shot_outcomes(judge, ClassifiedImages([(image, 0)], ("a",), ("red", "broken")), ["a {} one"])
