import json

import pytest
import torch
from PIL import Image

from fastsds.data import DataError
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo
from fastsds.evaluation.outcomes import Figure, Outcomes, choice_outcomes, pairing_outcomes, read_outcomes


def test_micro_is_over_samples_and_macro_over_groups():
    figure = Figure((1, 0, 1, 1), ("a", "b", "c", "d"), ("on", "on", "on", "under"))
    assert figure.micro == 3 / 4
    assert figure.group_means() == {"on": pytest.approx(2 / 3), "under": 1}
    assert figure.macro == pytest.approx((2 / 3 + 1) / 2)
    assert Figure((1, 0), ("a", "b")).macro is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (((), ()), "hits: expected at least one, each 0 or 1, got 0"),
        (((1, 0.5), ("a", "b")), r"hits: expected at least one, each 0 or 1, got 2: \(1, 0.5\)"),
        (((1, 0), ("a",)), "keys: expected one for each of 2 hits, got 1"),
        (((1, 0), ("a", "b"), ("on",)), "groups: expected one for each of 2 hits, got 1"),
        (((1, 0), ("a", "a")), "keys: expected each once, got 'a' 2 times"),
    ],
)
def test_wrong_figures_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        Figure(*columns)


def test_groups_become_figures_of_their_own():
    figure = Figure((1, 0, 1), ("a", "b", "c"), ("on", "on", "under"), 0.5)
    outcomes = Outcomes("toy", {"accuracy": figure}).with_groups_of("accuracy")
    assert list(outcomes.figures) == ["accuracy", "on", "under"]
    assert outcomes.figures["on"] == Figure((1, 0), ("a", "b"), ("on", "on"), 0.5)
    assert outcomes.figures["under"].keys == ("c",)


def test_choices_know_their_chance_level():
    image = Image.new("RGB", (4, 4))
    examples = [CaptionChoice("a", image, ("x", "y"), 0), CaptionChoice("b", image, ("w", "x", "y", "z"), 3)]
    figure = choice_outcomes("toy", examples, [True, False]).figures["accuracy"]
    assert (figure.hits, figure.keys, figure.groups) == ((1, 0), ("a", "b"), None)
    assert figure.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_examples_of_one_image_are_a_unit(tmp_path):
    """Whichever way the image is given, and whatever is cut out of it."""
    path, image = tmp_path / "a.png", Image.new("RGB", (4, 4))
    images = [path, image, str(path), Image.new("RGB", (4, 4)), image, tmp_path / "b.png"]
    boxes = [None, (0, 0, 2, 2), (0, 0, 1, 1), None, None, None]
    examples = [
        CaptionChoice(str(at), image, ("x", "y"), 0, box=box)
        for at, (image, box) in enumerate(zip(images, boxes, strict=True))
    ]
    assert choice_outcomes("toy", examples, [True] * 6).figures["accuracy"].units == ("0", "1", "0", "3", "1", "5")
    assert choice_outcomes("toy", examples[2:], [True] * 4).figures["accuracy"].units is None


def test_pairings_give_winogrounds_figures():
    image = Image.new("RGB", (4, 4))
    examples = [TwoByTwo(key, (image, image), ("x y", "y x"), group) for key, group in (("0", "Object"), ("1", "Both"))]
    outcomes = pairing_outcomes(
        "winoground", examples, torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [True, True]])
    )
    hits = {name: figure.hits for name, figure in outcomes.figures.items()}
    assert hits == {"text": (1, 0), "image": (1, 1), "group": (1, 0), "pair": (1, 1, 1, 0)}
    assert outcomes.figures["pair"].keys == ("0 image 0", "0 image 1", "1 image 0", "1 image 1")
    assert outcomes.figures["pair"].units == ("0", "0", "1", "1")
    assert outcomes.figures["pair"].groups == ("Object", "Object", "Both", "Both")


def test_outcomes_come_back_from_their_file(tmp_path):
    outcomes = Outcomes("toy", {"accuracy": Figure((1, 0), ("a", "b"), ("on", "under"), 0.5, ("u", "u"))})
    (tmp_path / "outcomes.json").write_text(json.dumps(outcomes.to_json()))
    assert read_outcomes(tmp_path) == read_outcomes(tmp_path / "outcomes.json") == outcomes


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"benchmark": "toy", "figures": {"accuracy": {"hits": [1]}}}'])
def test_a_file_without_outcomes_is_named(tmp_path, text):
    path = tmp_path / "outcomes.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"outcomes\.json does not hold outcomes"):
        read_outcomes(path)
    with pytest.raises(DataError, match=r"could not read .*missing\.json: No such file"):
        read_outcomes(tmp_path / "missing.json")


def test_boxes_are_cut_out_and_padded_with_black():
    image = Image.new("RGB", (8, 8), "white")
    image.putpixel((2, 3), (255, 0, 0))
    cut = CaptionChoice("a", image, ("x", "y"), 0, box=(2, 3, 12, 5)).load()
    assert cut.size == (10, 2)
    assert (cut.getpixel((0, 0)), cut.getpixel((9, 0))) == ((255, 0, 0), (0, 0, 0))


@pytest.mark.parametrize("box", [(8, 0, 9, 6), (0, 6, 8, 7), (-3, 0, 0, 6), (0, -1, 8, 0), (0, 0, 10**9, 6)])
def test_a_box_beyond_the_image_is_named(box):
    example = CaptionChoice("a", Image.new("RGB", (8, 6)), ("x", "y"), 0, box=box)
    with pytest.raises(DataError, match=rf"box: expected a part of an image .* 8 x 6 .*, got \[{box[0]}, {box[1]}, "):
        example.load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": ("x",), "right": 0}, "captions: expected for 'a' at least two and `right` below .* got 1 and"),
        ({"captions": ("x", "y"), "right": 2}, "got 2 and right=2"),
        ({"captions": ("x", "y"), "right": 0, "box": (3, 0, 3, 4)}, r"box: expected for 'a' .* got \[3, 0, 3, 4\]"),
    ],
)
def test_wrong_choices_are_named(fields, message):
    with pytest.raises(DataError, match=message):
        CaptionChoice("a", Image.new("RGB", (4, 4)), **fields)
