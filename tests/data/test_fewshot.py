"""CoOp's files, sampling and class split, against its rules written out here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fastsds.data import DataError, FewShotDataset, FewShotSplit, LabelledImage

NAMES = {0: "tree_frog", 1: "cat", 2: "dog", 3: "owl", 4: "ant"}


def _rows(part: str, per_class: int) -> list[list[Any]]:
    rows = [[f"{name}/{part}{index}.png", label, name] for label, name in NAMES.items() for index in range(per_class)]
    random.Random(part).shuffle(rows)  # the field's files are not in order either
    return rows


@pytest.fixture
def document() -> dict[str, list[list[Any]]]:
    return {"train": _rows("train", 6), "val": _rows("val", 5), "test": _rows("test", 2)}


@pytest.fixture
def split_file(document: dict[str, list[list[Any]]], tmp_path: Path) -> Path:
    for rows in document.values():
        for path, label, _ in rows:
            (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (label, 0, 0)).save(tmp_path / "images" / path)
    file = tmp_path / "split_zhou_Animals.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


@pytest.fixture
def split(split_file: Path) -> FewShotSplit:
    return FewShotSplit.from_json(split_file, split_file.parent / "images")


def _item(label: int, name: str, key: str = "") -> LabelledImage:
    return LabelledImage(Image.new("RGB", (1, 1)), label, name, key)


def _keys(items: tuple[LabelledImage, ...]) -> list[str]:
    return [item.key for item in items]


def test_files_are_read_in_their_order(split: FewShotSplit, document: dict[str, list[list[Any]]]) -> None:
    for part in ("train", "val", "test"):
        assert _keys(getattr(split, part)) == [row[0] for row in document[part]]
    assert split.classnames == ("tree frog", "cat", "dog", "owl", "ant")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 4, 5])
def test_few_shots_are_those_that_coop_draws(
    split: FewShotSplit, document: dict[str, list[list[Any]]], shots: int, seed: int
) -> None:
    random.seed(seed)
    expected = {}
    for part, count in (("train", shots), ("val", min(shots, 4))):
        groups: dict[int, list[str]] = {}
        for path, label, _ in document[part]:
            groups.setdefault(label, []).append(path)
        expected[part] = [path for paths in groups.values() for path in random.sample(paths, count)]
    drawn = split.few_shot(shots, seed)
    assert _keys(drawn.train) == expected["train"]
    assert _keys(drawn.val) == expected["val"]
    assert drawn.test == split.test


def test_classes_with_too_few_images_are_named_or_repeated_when_asked(split: FewShotSplit) -> None:
    message = r"shots: expected 16 train images of every class, 5 of 5 classes have fewer, first '.*' has 6, .*, …"
    with pytest.raises(DataError, match=message):
        split.few_shot(16, seed=1)
    repeated = split.few_shot(16, seed=1, repeat=True)
    assert len(repeated.train) == 5 * 16
    assert set(_keys(repeated.train)) <= set(_keys(split.train))
    with pytest.raises(DataError, match="shots: expected at least 1, got 0"):
        split.few_shot(0, seed=1)


def test_base_is_the_first_half_of_the_labels_and_novel_the_rest(split: FewShotSplit) -> None:
    base, novel = split.base(), split.novel()
    assert base.classnames == ("tree frog", "cat", "dog")
    assert novel.classnames == ("owl", "ant")
    for half, first in ((base, 0), (novel, 3)):
        for part in ("train", "val", "test"):
            items = getattr(half, part)
            assert {item.label for item in items} == set(range(len(half.classnames)))
            original = {item.key: item.label for item in getattr(split, part)}
            assert all(original[item.key] == item.label + first for item in items)
            assert len(items) == len(half.classnames) * len(original) // 5


def test_labels_need_not_be_dense() -> None:
    items = tuple(_item(label, name) for label, name in ((7, "b"), (2, "a"), (9, "c")))
    split = FewShotSplit(items, (), items)
    assert split.base().classnames == ("a", "b")
    assert [(item.label, item.classname) for item in split.novel().test] == [(0, "c")]
    with pytest.raises(DataError, match="classes: expected at least 2 to have novel ones, got 1"):
        split.novel().novel()


def test_folders_are_read_by_class(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("tree_frog", "cat"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (1, 1)).save(tmp_path / part / name / f"{index}.PNG")
            (tmp_path / part / name / "notes.txt").write_text("", encoding="utf-8")
    split = FewShotSplit.from_folders(tmp_path)
    assert split.classnames == ("cat", "tree frog")
    assert _keys(split.train) == [
        "train/cat/0.PNG",
        "train/cat/1.PNG",
        "train/tree_frog/0.PNG",
        "train/tree_frog/1.PNG",
    ]
    assert split.val == ()
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(DataError, match=r"root: .*dog is a class that .*train has not"):
        FewShotSplit.from_folders(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"root: expected images in .*dog, got none"):
        FewShotSplit.from_folders(tmp_path)
    with pytest.raises(DataError, match=r"root: could not read .*elsewhere.train: No such file"):
        FewShotSplit.from_folders(tmp_path / "elsewhere")


def test_absent_images_are_counted_and_the_first_named(split_file: Path) -> None:
    root = split_file.parent / "images"
    for name in ("cat/test0.png", "cat/test1.png", "dog/train0.png", "owl/val0.png"):
        (root / name).unlink()
    with pytest.raises(DataError, match=r"path: 4 of the 65 images of .*json are absent below .*images, first .*, …; "):
        FewShotSplit.from_json(split_file, root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"path: .*file\.json is not JSON"),
        ("[]", r"path: expected .*file\.json to hold the lists train, val and test, train is none"),
        ('{"train": [], "val": []}', "to hold the lists train, val and test, test is none"),
        (
            '{"train": [["a.png", 0]]}',
            r"path: expected rows \[path, label, classname\] in train of .*, got \['a\.png', 0\]",
        ),
        (
            '{"train": [["a.png", "zero", "cat"]]}',
            r"path: expected rows \[path, label, classname\] in train of .*, got \['a\.png', 'zero', 'cat'\]",
        ),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        FewShotSplit.from_json(file, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"path: could not read .*none\.json: No such file"):
        FewShotSplit.from_json(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], [], "train: expected at least one image, got none"),
        ([(0, "cat"), (0, "dog")], [], "label 0: has two names, 'cat' and 'dog'"),
        ([(0, "cat"), (1, "cat")], [], "classname 'cat': names both label 0 and label 1"),
        ([(0, " ")], [], "classname: expected a name for label 0, got ' '"),
        ([(0, "cat")], [(0, "cat"), (4, "owl")], r"val, test: .*, got unknown labels 4 \(owl\)"),
    ],
)
def test_classes_that_contradict_each_other_are_refused(
    train: list[tuple[int, str]], test: list[tuple[int, str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        FewShotSplit(tuple(_item(*one) for one in train), (), tuple(_item(*one) for one in test))


def test_attributes_go_to_their_images(split: FewShotSplit) -> None:
    attributes = {item.key: f"word {index}" for index, item in enumerate(split.train)}
    labelled = split.with_attributes(attributes)
    assert [item.attribute for item in labelled.train] == [f"word {index}" for index in range(len(split.train))]
    lacking = {key: word for key, word in attributes.items() if not key.startswith("cat")}
    with pytest.raises(
        DataError, match=r"attributes: 6 of 30 training images have none, first cat/train\d\.png, .*, …; "
    ):
        split.with_attributes(lacking)


def test_rows_are_image_label_and_attribute(split: FewShotSplit) -> None:
    def preprocess(image: Image.Image) -> Tensor:
        return torch.tensor(image.getpixel((0, 0)))

    dataset = FewShotDataset(split.test, preprocess)
    assert "attributes" not in dataset[0]
    labelled = FewShotDataset(split.with_attributes({item.key: item.key for item in split.train}).train, preprocess)
    batch = next(iter(DataLoader(labelled, batch_size=3)))
    assert batch["images"][:, 0].tolist() == batch["labels"].tolist() == [item.label for item in split.train[:3]]
    assert batch["attributes"] == _keys(split.train[:3])


def test_images_that_cannot_be_read_are_named(split: FewShotSplit, tmp_path: Path) -> None:
    dataset = FewShotDataset(split.train, lambda image: torch.zeros(1))
    Path(str(split.train[0].image)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image: .*train\d\.png cannot be read"):
        dataset[0]
    Path(str(split.train[1].image)).unlink()
    with pytest.raises(DataError, match=r"image: .*train\d\.png does not exist"):
        dataset[1]
    with pytest.raises(DataError, match="items: expected at least one, got none"):
        FewShotDataset((), lambda image: torch.zeros(1))


def test_hidden_files_and_folders_are_no_classes_and_images(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/cat/._a.png", "train/.ipynb_checkpoints/a.png", "test/cat/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    split = FewShotSplit.from_folders(tmp_path)
    assert split.classnames == ("cat",) and [item.key for item in split.train] == ["train/cat/a.png"]
