from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor

from fastsds.data import DataError
from fastsds.evaluation import (
    CaptionChoice,
    ClipJudge,
    TwoByTwo,
    caption_choice_outcomes,
    two_by_two_outcomes,
    winoground_scores,
    winoground_similarity,
)

Make = Callable[..., ClipJudge]
RED, GREEN, BLUE = (f"a {colour} one" for colour in ("red", "green", "blue"))
# yellow is as far from red as from green
YELLOW = "a yellow one"


def _image(*colour: int) -> Image.Image:
    return Image.new("RGB", (2, 2), colour)


def _hits(judge: ClipJudge, examples: list[CaptionChoice]) -> list[float]:
    return list(caption_choice_outcomes(judge, examples).figures["accuracy"].hits)


def test_the_right_caption_must_be_strictly_nearest(colour_judge: Make) -> None:
    red, orange, yellow = _image(255, 0, 0), _image(255, 100, 0), _image(255, 255, 0)
    examples = [
        CaptionChoice("0", red, (RED, GREEN), 0),
        CaptionChoice("1", red, (RED, GREEN), 1),
        CaptionChoice("2", orange, (GREEN, RED), 1),
        CaptionChoice("3", yellow, (GREEN, RED), 1),  # a tie
        CaptionChoice("4", yellow, (GREEN, RED), 0),  # a tie
        CaptionChoice("5", yellow, (RED, YELLOW), 1),
        CaptionChoice("6", red, (RED, RED), 0),  # the same words
    ]
    assert _hits(colour_judge(), examples) == [1, 0, 1, 0, 0, 1, 0]


def test_equal_embeddings_tie_to_the_last_bit() -> None:
    """A matrix product may round the same row differently in another column."""
    torch.manual_seed(1)
    width, captions = 515, 33

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, width))
            self.text = torch.nn.Parameter(torch.randn(1, width))

        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.nn.functional.normalize(self.text.expand(len(tokens), -1), dim=-1)

        def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.nn.functional.normalize(images[:, :, 0, 0] @ self.weight, dim=-1)

    judge = ClipJudge(Clip(), to_tensor, lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64))
    images = [_image(*torch.randint(1, 255, (3,)).tolist()) for _ in range(19)]
    scores = judge.match(images, [[f"{column}" for column in range(captions)]] * len(images))
    assert scores.dtype == torch.float32
    assert bool((scores == scores[:, :1]).all())


def test_examples_may_have_different_numbers_of_captions(colour_judge: Make) -> None:
    blue = _image(0, 0, 255)
    examples = [
        CaptionChoice("0", blue, (RED, BLUE), 1),
        CaptionChoice("1", blue, (BLUE, RED, GREEN, YELLOW), 0),
        CaptionChoice("2", blue, (RED, GREEN, BLUE), 0),
    ]
    assert _hits(colour_judge(), examples) == [1, 1, 0]


def test_keys_that_repeat_are_named_before_anything_is_encoded(colour_judge: Make, tmp_path: Path) -> None:
    absent = tmp_path / "absent.png"
    choices = [CaptionChoice(key, absent, (RED, GREEN), 0) for key in ("3", "4", "3", "4", "5")]
    with pytest.raises(DataError, match=r"examples: expected each id or key once, 2 repeat: 3, 4$"):
        caption_choice_outcomes(colour_judge(), choices)
    with pytest.raises(DataError, match=r"examples: expected each id or key once, 1 repeat: 7$"):
        two_by_two_outcomes(colour_judge(), [TwoByTwo("7", (absent, absent), (RED, GREEN))] * 2)


def test_boxes_are_cut_before_preprocessing(colour_judge: Make, tmp_path: Path, paint: Any) -> None:
    path = paint(tmp_path / "halves.png", "red", "green")
    examples = [
        CaptionChoice("left", path, (GREEN, RED), 1, box=(0, 0, 4, 6)),
        CaptionChoice("right", path, (GREEN, RED), 1, box=(4, 0, 8, 6)),
    ]
    assert _hits(colour_judge(), examples) == [1, 0]


def test_winogrounds_figures_by_hand(colour_judge: Make) -> None:
    red, green, orange, yellow = _image(255, 0, 0), _image(0, 255, 0), _image(255, 100, 0), _image(255, 255, 0)
    examples = [
        TwoByTwo("right", (red, green), (RED, GREEN), "Object"),
        TwoByTwo("swapped", (green, red), (RED, GREEN), "Object"),
        TwoByTwo("both look red", (orange, red), (GREEN, RED), "Both"),  # image 0 prefers red; captions choose well
        TwoByTwo("tie", (yellow, green), (RED, GREEN), "Both"),  # image 0 is as near to either; captions choose well
        TwoByTwo("same image", (red, red), (RED, GREEN), "Both"),  # the captions tie between the images
    ]
    figures = two_by_two_outcomes(colour_judge(), examples).figures
    assert figures["text"].hits == (1, 0, 0, 0, 0)
    assert figures["image"].hits == (1, 0, 1, 1, 0)
    assert figures["group"].hits == (1, 0, 0, 0, 0)
    assert figures["pair"].hits == (1, 1, 0, 0, 0, 1, 0, 1, 1, 0)
    assert figures["image"].macro == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_outcomes_average_to_winogrounds_scores(clip: Any, clip_tokenizer: Any) -> None:
    """Of a genuine model with its own tokenizer, against the scores from its similarities."""
    torch.manual_seed(3)
    pictures = [to_pil_image(image) for image in torch.rand(24, 3, 32, 32)]
    captions = [(f"the {a} and {b}", f"the {b} and {a}") for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
    examples = [
        TwoByTwo(str(row), (pictures[2 * row], pictures[2 * row + 1]), pair) for row, pair in enumerate(captions)
    ]
    figures = two_by_two_outcomes(ClipJudge(clip, to_tensor, clip_tokenizer, batch_size=5), examples).figures
    images = torch.stack([to_tensor(picture) for picture in pictures]).unflatten(0, (-1, 2))
    expected = winoground_scores(winoground_similarity(clip, clip_tokenizer, images, captions)).to_json()
    assert {name: figure.micro for name, figure in figures.items()} == pytest.approx(expected)
    assert 0 < expected["pair"] < 1


def test_a_caption_is_encoded_once_and_everything_in_batches(colour_judge: Make) -> None:
    judge = colour_judge(batch_size=2)
    examples = [CaptionChoice(str(row), _image(255, 0, 0), (RED, GREEN, BLUE), 0) for row in range(5)]
    assert _hits(judge, examples) == [1] * 5
    assert judge.clip.encoded_texts == [2, 1]
    assert judge.clip.encoded_images == [2, 2, 1]


def test_an_image_is_read_and_encoded_once(colour_judge: Make, tmp_path: Path, paint: Any) -> None:
    """Five captions of each image in turn, as in COCO-Order; other boxes are other images."""
    red, halves = paint(tmp_path / "red.png", "red"), paint(tmp_path / "halves.png", "green", "blue")
    examples = [CaptionChoice(f"red {row}", red, (RED, GREEN), int(row > 2)) for row in range(5)]
    for side, box in (("left", (0, 0, 4, 6)), ("right", (4, 0, 8, 6))):
        examples += [CaptionChoice(f"{side} {row}", halves, (BLUE, GREEN), 1, box=box) for row in range(2)]
    judge = colour_judge()
    assert _hits(judge, examples[::2] + examples[1::2]) == [1, 1, 0, 1, 0, 1, 0, 1, 0]
    assert judge.clip.encoded_images == [3]


def test_worker_processes_change_nothing_but_who_reads(colour_judge: Make, tmp_path: Path, paint: Any) -> None:
    colours = ["red", "green", "blue", "yellow", "red"]
    paths = [paint(tmp_path / f"{row}.png", colour) for row, colour in enumerate(colours)]
    examples = [CaptionChoice(path.name, path, (RED, GREEN, BLUE), row % 3) for row, path in enumerate(paths)]
    assert _hits(colour_judge(workers=2, batch_size=2), examples) == _hits(colour_judge(), examples) == [1, 1, 1, 0, 0]
    paths[3].write_bytes(paths[3].read_bytes()[:40])
    with pytest.raises(DataError, match=r"^image: .*3\.png cannot be read [^\n]*$"):
        _hits(colour_judge(workers=2, batch_size=2), examples)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_wrong_answers(colour_judge: Make, bad: float) -> None:
    judge = colour_judge({"broken": [bad, 0.0, 0.0]})
    image = _image(255, 0, 0)
    with pytest.raises(ValueError, match="scores: expected finite values, got 1 that are not"):
        caption_choice_outcomes(judge, [CaptionChoice("0", image, (RED, "broken"), 0)])
    with pytest.raises(ValueError, match="scores: expected finite values, got 2 that are not"):
        two_by_two_outcomes(judge, [TwoByTwo("0", (image, image), (RED, "broken"))])


def test_nothing_to_judge_is_an_error(colour_judge: Make) -> None:
    for outcomes in (caption_choice_outcomes, two_by_two_outcomes):
        with pytest.raises(ValueError, match="examples: expected at least one, got none"):
            outcomes(colour_judge(), [])
    with pytest.raises(ValueError, match=r"captions: expected for each of 2 images .* got 2 lists of lengths \[1, 2\]"):
        colour_judge().match([_image(0, 0, 0)] * 2, [[RED], [RED, BLUE]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(colour_judge: Make, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        colour_judge(**options)
