from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest

from fastsds.data import DataError
from fastsds.evaluation import (
    read_class_folders,
    read_classnames,
    read_templates,
    read_torchvision,
    zero_shot_outcomes,
)
from fastsds.evaluation.classification import TORCHVISION

TEMPLATES = ("a {} one",)


@pytest.fixture
def folders(tmp_path: Path, paint: Any) -> Path:
    """ImageNet's layout: three classes of two images, one of which looks like another class."""
    root = tmp_path / "val"
    for folder, colours in (("n01", ("red", "red")), ("n02", ("green", "blue")), ("n03", ("blue", "yellow"))):
        for at, colour in enumerate(colours):
            paint(root / folder / f"ILSVRC2012_val_{at:08d}.PNG", colour)
    return root


def test_folders_are_classes_in_their_order(folders: Path, colour_judge: Any) -> None:
    data = read_class_folders(folders, ("red", "green", "blue"))
    assert data.keys[:3] == (
        "n01/ILSVRC2012_val_00000000.PNG", "n01/ILSVRC2012_val_00000001.PNG", "n02/ILSVRC2012_val_00000000.PNG",
    )  # fmt: skip
    figure = zero_shot_outcomes(colour_judge(batch_size=4), data, TEMPLATES).figures["accuracy"]
    assert figure.hits == (1, 1, 1, 0, 1, 0)
    assert figure.groups == ("red", "red", "green", "green", "blue", "blue")
    assert (figure.micro, figure.chance) == (pytest.approx(4 / 6), pytest.approx(1 / 3))
    assert figure.macro == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_folders_names_are_the_classes_by_default(tmp_path: Path, paint: Any) -> None:
    for folder in ("polar_bear", "cat"):
        paint(tmp_path / folder / "a.jpg", "red")
        (tmp_path / folder / "notes.txt").write_text("no image")
    data = read_class_folders(tmp_path)
    assert (data.classnames, data.keys) == (("cat", "polar bear"), ("cat/a.jpg", "polar_bear/a.jpg"))


def test_wrong_folders_are_named(folders: Path, tmp_path: Path, colour_judge: Any) -> None:
    with pytest.raises(DataError, match=r"root: could not read .*nowhere: No such file"):
        read_class_folders(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"classnames: expected one for each of the 3 folders in .*val, got 2"):
        read_class_folders(folders, ("red", "green"))
    path = next((folders / "n02").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"image: .*n02.* cannot be read"):
        zero_shot_outcomes(colour_judge(), read_class_folders(folders, ("red", "green", "blue")), TEMPLATES)
    (folders / "n04").mkdir()
    with pytest.raises(DataError, match=r"root: expected images in .*n04, got none"):
        read_class_folders(folders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="images: expected at least one, of at least two named classes, got 0 of 0"):
        read_class_folders(tmp_path / "empty")


def test_imagenets_names_and_clips_templates_are_open_clips() -> None:
    names = read_classnames("imagenet")
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet paper")
    assert read_templates("photo") == ("a photo of a {}.",)
    for source, makers in (
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES), ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
    ):  # fmt: skip
        for given in (source, Path(source)):  # a path from the command line
            templates = read_templates(given)
            assert [template.replace("{}", "polar bear") for template in templates] == [
                make("polar bear") for make in makers
            ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "tench\n\npolar bear\n"),
        ("windows.txt", "\ufefftench\r\npolar bear\r\n"),
        ("names.json", '["tench", "polar bear"]'),
        ("folders.json", '{"n02": "polar bear", "n01": "tench"}'),
        ("imagenet_class_index.json", '{"0": ["n01440764", "tench"], "1": ["n02134084", "polar bear"]}'),
    ],
)
def test_class_names_come_from_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_classnames(tmp_path / name) == ("tench", "polar bear")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.json", "[1, 2]", r"classnames: expected a list of names in .*names\.json"),
        ("names.json", "[]", r"classnames: expected a list of names in .*names\.json"),
        ("names.json", "[", r"path: .*names\.json is not JSON"),
        ("names.json", '{"n01": 1}', r"classnames: expected a list of names in .*names\.json"),
        ("names.txt", " \n", r"path: expected lines in .*names\.txt, got none"),
        ("index.json", json.dumps({str(at): f"class {at}" for at in range(11)}),
         r"classnames: the keys of .*index\.json sort otherwise as folders than as numbers; give a list"),
    ],
)  # fmt: skip
def test_wrong_class_names_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_classnames(tmp_path / name)
    with pytest.raises(DataError, match=r"path: could not read .*missing\.txt: No such file"):
        read_classnames(tmp_path / "missing.txt")


def test_templates_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a photo of {}\nart of the {}\n")
    (tmp_path / "templates.json").write_text('["a photo of {}", "art of the {}"]')
    for path in tmp_path.iterdir():
        assert read_templates(path) == ("a photo of {}", "art of the {}")
    (tmp_path / "templates.txt").write_text("a photo of {}\na photo\n")
    with pytest.raises(DataError, match=r"templates: expected lines with \{\} for the class name .*, got 'a photo'"):
        read_templates(tmp_path / "templates.txt")
    (tmp_path / "templates.json").write_text("3")
    with pytest.raises(DataError, match=r"templates: expected lines with \{\} .*templates\.json"):
        read_templates(tmp_path / "templates.json")


def _food101(root: Path, paint: Any) -> None:
    for name in ("red/1", "green/2", "green/3"):
        paint(root / "food-101" / "images" / f"{name}.jpg", name.split("/")[0])
    (root / "food-101" / "meta").mkdir()
    (root / "food-101" / "meta" / "test.json").write_text(
        json.dumps({"red": ["red/1"], "green": ["green/2", "green/3"]})
    )


def _eurosat(root: Path, paint: Any) -> None:
    for name, colour in (("red", "red"), ("blue", "blue"), ("green", "blue")):
        paint(root / "eurosat" / "2750" / name / f"{name}_1.jpg", colour)


def _dtd(root: Path, paint: Any) -> None:
    lines = []
    for name in ("white", "yellow"):
        paint(root / "dtd" / "dtd" / "images" / name / f"{name}_0001.jpg", name)
        lines.append(f"{name}/{name}_0001.jpg\n")
    (root / "dtd" / "dtd" / "labels").mkdir()
    (root / "dtd" / "dtd" / "labels" / "test1.txt").write_text("".join(lines))


def _mnist(root: Path, paint: Any) -> None:
    """Two digits in IDX files: a black and a white picture, whose labels are both 1."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    header = np.array([0x803, 2, 28, 28], dtype=">i4").tobytes()
    pictures = np.zeros((2, 28, 28), dtype=np.uint8)
    pictures[1] = 255
    (folder / "t10k-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(np.array([0x801, 2], dtype=">i4").tobytes() + bytes([1, 1]))
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "write", "classnames", "hits"),
    [
        ("Food101", _food101, ("green", "red"), (1, 1, 1)),
        ("EuroSAT", _eurosat, ("blue", "green", "red"), (1, 0, 1)),
        ("DTD", _dtd, ("white", "yellow"), (1, 1)),
    ],
)
def test_torchvisions_data_sets_are_read(
    tmp_path: Path, paint: Any, colour_judge: Any, name: str, write: Any, classnames: tuple[str, ...], hits: Any
) -> None:
    write(tmp_path, paint)
    data = read_torchvision(name, tmp_path)
    assert data.classnames == classnames
    figure = zero_shot_outcomes(colour_judge(), data, TEMPLATES).figures["accuracy"]
    assert sorted(figure.hits) == sorted(hits)


def test_torchvisions_grey_digits_are_read(tmp_path: Path, paint: Any, colour_judge: Any) -> None:
    _mnist(tmp_path, paint)
    assert read_torchvision("MNIST", tmp_path).classnames[:2] == ("0 - zero", "1 - one")
    data = read_torchvision("MNIST", tmp_path, ("red", "white", *"bcdefghi"))
    judge = colour_judge({f"a {letter} one": [-1.0, -1.0, -1.0] for letter in "bcdefghi"})
    assert zero_shot_outcomes(judge, data, TEMPLATES).figures["accuracy"].hits == (0, 1)


def test_torchvisions_names_are_all_its_classes() -> None:
    from torchvision import datasets

    assert all(hasattr(datasets, name) for name in TORCHVISION)


def test_wrong_torchvision_data_is_named(tmp_path: Path, paint: Any, colour_judge: Any) -> None:
    with pytest.raises(DataError, match=r"name: expected one of Caltech101, .*, got 'ImageNet22k'"):
        read_torchvision("ImageNet22k", tmp_path)
    for name in ("CIFAR10", "Food101", "EuroSAT", "DTD", "OxfordIIITPet", "SUN397", "StanfordCars", "Caltech101"):
        with pytest.raises(DataError, match=f"root: torchvision could not read {name} below .*"):
            read_torchvision(name, tmp_path)
    _food101(tmp_path, paint)
    with pytest.raises(DataError, match="classnames: expected one for each of the 2 classes of Food101, got 1"):
        read_torchvision("Food101", tmp_path, ("red",))
    meta = tmp_path / "food-101" / "meta" / "test.json"
    path = tmp_path / "food-101" / "images" / "red" / "1.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="image: number 0 cannot be read"):
        zero_shot_outcomes(colour_judge(), read_torchvision("Food101", tmp_path), TEMPLATES)
    meta.write_text('{"red": [], "green": []}')
    with pytest.raises(DataError, match="images: expected at least one, of at least two named classes, got 0 of 2"):
        read_torchvision("Food101", tmp_path)
    meta.write_text('{"red": ["red/1"')
    with pytest.raises(DataError, match=r"root: torchvision could not read Food101 below .*delimiter"):
        read_torchvision("Food101", tmp_path)
