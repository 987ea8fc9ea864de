"""Few-shot classification data in the formats of CoOp (Zhou et al., IJCV 2022), with its sampling and class split."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from fastsds.data.captions import Preprocess
from fastsds.data.files import DataError, first_names, read_json
from fastsds.data.images import image_files, open_image


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class."""

    image: str | Path | Image.Image
    label: int
    classname: str
    key: str = ""
    """What attribute labels call the image: its path as the data file has it."""
    attribute: str | None = None


@dataclass(frozen=True)
class FewShotSplit:
    """Training, validation and test images of the same classes.

    Raises:
        DataError: no training images, a label with two names or a name with two labels, an empty name, or images of
            classes that training has not.
    """

    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError("train: expected at least one image, got none")
        names = _names_by_label((*self.train, *self.val, *self.test))
        unknown = sorted(names.keys() - {item.label for item in self.train})
        if unknown:
            raise DataError(
                f"val, test: expected classes that training has, got unknown labels {first_names(unknown)} "
                f"({first_names([names[label] for label in unknown])})"
            )

    @property
    def classnames(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return tuple(name for _, name in sorted(_names_by_label(self.train).items()))

    @classmethod
    def from_json(cls, path: str | Path, image_root: str | Path) -> FewShotSplit:
        """Reads `split_zhou_<Dataset>.json`: `{"train"|"val"|"test": [[path, label, classname], …]}`.

        Args:
            image_root: folder that the paths start from.

        Raises:
            DataError: a file that cannot be read or is not of the format, or images that are absent (the message counts
                them and names the first).
        """
        path, image_root = Path(path), Path(image_root)
        document = read_json(path)
        parts: dict[str, tuple[LabelledImage, ...]] = {}
        for part in ("train", "val", "test"):
            if not isinstance(document, dict) or not isinstance(document.get(part), list):
                raise DataError(f"path: expected {path} to hold the lists train, val and test, {part} is none")
            parts[part] = tuple(_parse(row, part, path, image_root) for row in document[part])
        absent = [item.key for items in parts.values() for item in items if not Path(str(item.image)).is_file()]
        if absent:
            total = sum(len(items) for items in parts.values())
            raise DataError(
                f"path: {len(absent)} of the {total} images of {path} are absent below {image_root}, "
                f"first {first_names(absent)}; check image_root"
            )
        return cls(**parts)

    @classmethod
    def from_folders(cls, root: str | Path) -> FewShotSplit:
        """Reads `root/{train,val,test}/<classname>/<image>`; `val` may be missing.

        Labels follow the sorted class names of `train`; underscores in a folder's name stand for spaces.

        Raises:
            DataError: a folder that is missing or without images, or a class that training has not.
        """
        root = Path(root)
        folders = _subfolders(root / "train")
        labels = {folder.name: label for label, folder in enumerate(folders)}
        parts: dict[str, tuple[LabelledImage, ...]] = {"val": ()}
        for part in ("train", "val", "test"):
            if part == "val" and not (root / part).is_dir():
                continue
            items: list[LabelledImage] = []
            for folder in _subfolders(root / part):
                if folder.name not in labels:
                    raise DataError(f"root: {folder} is a class that {root / 'train'} has not")
                images = image_files(folder, subfolders=False)
                if not images:
                    raise DataError(f"root: expected images in {folder}, got none")
                items += [
                    LabelledImage(image, labels[folder.name], _words(folder.name), image.relative_to(root).as_posix())
                    for image in images
                ]
            parts[part] = tuple(items)
        return cls(**parts)

    def few_shot(self, shots: int, seed: int, *, repeat: bool = False) -> FewShotSplit:
        """The field's few-shot subset: `shots` training and `min(shots, 4)` validation images of every class.

        The same images as CoOp draws for the seed: one generator, class by class in the order in which the file first
        mentions them, training before validation. Draw before taking `base` or `novel`, as CoOp does.

        Args:
            repeat: draw with replacement where a class has too few images, as CoOp does without saying so.

        Raises:
            DataError: a class with fewer images, unless `repeat`.
        """
        rng = random.Random(seed)
        train = sample_shots(self.train, shots, rng, part="train", repeat=repeat)
        val = sample_shots(self.val, min(shots, 4), rng, part="val", repeat=repeat)
        return replace(self, train=train, val=val)

    def base(self) -> FewShotSplit:
        """The first `ceil(classes / 2)` labels, relabelled from 0."""
        labels = sorted({item.label for item in self.train})
        return self._subset(labels[: math.ceil(len(labels) / 2)])

    def novel(self) -> FewShotSplit:
        """The labels that `base` leaves, relabelled from 0.

        Raises:
            DataError: there is one class only.
        """
        labels = sorted({item.label for item in self.train})
        if len(labels) < 2:
            raise DataError(f"classes: expected at least 2 to have novel ones, got {len(labels)}")
        return self._subset(labels[math.ceil(len(labels) / 2) :])

    def with_attributes(self, attributes: Mapping[str, str]) -> FewShotSplit:
        """Gives every training image its attribute, by its key; `data.read_attributes` reads them.

        Raises:
            DataError: training images without one (the message counts them and names the first).
        """
        lacking = [item.key for item in self.train if not attributes.get(item.key)]
        if lacking:
            raise DataError(
                f"attributes: {len(lacking)} of {len(self.train)} training images have none, first "
                f"{first_names(lacking)}; label them with `fastsds attributes`"
            )
        return replace(self, train=tuple(replace(item, attribute=attributes[item.key]) for item in self.train))

    def _subset(self, labels: Sequence[int]) -> FewShotSplit:
        position = {label: index for index, label in enumerate(labels)}

        def pick(items: Sequence[LabelledImage]) -> tuple[LabelledImage, ...]:
            return tuple(replace(item, label=position[item.label]) for item in items if item.label in position)

        return FewShotSplit(pick(self.train), pick(self.val), pick(self.test))


class FewShotDataset(Dataset[dict[str, Any]]):
    """Rows `{"images", "labels"}`, and `"attributes"` where every image has one, as `IntCoOpTrainer` takes them.

    Args:
        items: the images, not empty.
        preprocess: the CLIP model's own.

    Raises:
        DataError: no items; or, when it is read, an image that is missing or cannot be decoded.
    """

    def __init__(self, items: Sequence[LabelledImage], preprocess: Preprocess) -> None:
        if not items:
            raise DataError("items: expected at least one, got none")
        self.items = tuple(items)
        self.preprocess = preprocess
        self._labelled = all(item.attribute for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        row: dict[str, Any] = {"images": self.preprocess(open_image(item.image)), "labels": item.label}
        return row | ({"attributes": item.attribute} if self._labelled else {})


def sample_shots(
    items: Sequence[LabelledImage], shots: int, rng: random.Random, *, part: str = "items", repeat: bool = False
) -> tuple[LabelledImage, ...]:
    """`shots` items of every class, class by class in the order of first mention.

    Raises:
        DataError: `shots` below 1, or a class with fewer items and `repeat` not set.
    """
    if shots < 1:
        raise DataError(f"shots: expected at least 1, got {shots}")
    by_label: dict[int, list[LabelledImage]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    short = [f"{found[0].classname!r} has {len(found)}" for found in by_label.values() if len(found) < shots]
    if short and not repeat:
        raise DataError(
            f"shots: expected {shots} {part} images of every class, {len(short)} of {len(by_label)} classes have "
            f"fewer, first {first_names(short)}"
        )
    drawn: list[LabelledImage] = []
    for found in by_label.values():
        drawn += rng.sample(found, shots) if len(found) >= shots else rng.choices(found, k=shots)
    return tuple(drawn)


def _parse(row: Any, part: str, path: Path, image_root: Path) -> LabelledImage:
    if not isinstance(row, list) or [type(field) for field in row] != [str, int, str]:
        raise DataError(f"path: expected rows [path, label, classname] in {part} of {path}, got {row!r}")
    key, label, classname = row
    return LabelledImage(image_root / key, label, _words(classname), key)


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"root: could not read {folder}: {error.strerror}") from error
    if not found:
        raise DataError(f"root: expected a folder per class in {folder}, got none")
    return found


def _names_by_label(items: Sequence[LabelledImage]) -> dict[int, str]:
    """The classes' names, checked to be one to one."""
    names: dict[int, str] = {}
    for item in items:
        if not item.classname.strip():
            raise DataError(f"classname: expected a name for label {item.label}, got {item.classname!r}")
        if names.setdefault(item.label, item.classname) != item.classname:
            raise DataError(f"label {item.label}: has two names, {names[item.label]!r} and {item.classname!r}")
    labels: dict[str, int] = {}
    for label, name in sorted(names.items()):
        if labels.setdefault(name, label) != label:
            raise DataError(f"classname {name!r}: names both label {labels[name]} and label {label}")
    return names


def _words(classname: str) -> str:
    return classname.replace("_", " ")
