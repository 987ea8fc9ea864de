"""What zero-shot classification reads: images with classes, class names and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastsds.data.files import DataError, first_names, read_json
from fastsds.data.images import ImageSource, image_files, open_image
from fastsds.evaluation.records import read_lines

TORCHVISION: dict[str, dict[str, Any]] = {
    "Caltech101": {}, "CIFAR10": {"train": False}, "CIFAR100": {"train": False}, "Country211": {"split": "test"},
    "DTD": {"split": "test"}, "EuroSAT": {}, "FGVCAircraft": {"split": "test"}, "Food101": {"split": "test"},
    "MNIST": {"train": False}, "OxfordIIITPet": {"split": "test"}, "RenderedSST2": {"split": "test"},
    "StanfordCars": {"split": "test"}, "STL10": {"split": "test"}, "SUN397": {},
}  # fmt: skip
"""torchvision's data sets that name their classes, and the arguments of the part that is tested on."""


@dataclass(frozen=True)
class ClassifiedImages:
    """Images, each of one class.

    Raises:
        DataError: no images, fewer than two classes of different names, or a class without a name.
    """

    images: Sequence[tuple[ImageSource, int]]
    """Items of an image and its label; opened when they are asked for."""
    keys: tuple[str, ...]
    classnames: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.keys or len(set(self.classnames)) < 2 or not all(name.strip() for name in self.classnames):
            raise DataError(
                f"images: expected at least one, of at least two named classes, got {len(self.keys)} of "
                f"{len(self.classnames)}: {first_names(self.classnames)}"
            )

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image in RGB, and its label.

        Raises:
            DataError: it does not exist or cannot be decoded.
        """
        try:
            image, label = self.images[index]
        except OSError as error:  # torchvision opens images itself
            raise DataError(f"image: number {index} cannot be read ({error}); replace it") from error
        return open_image(image), int(label)


def read_class_folders(root: Path, classnames: Sequence[str] | None = None) -> ClassifiedImages:
    """Reads `root/<class>/<image>`, as ImageNet's validation set is laid out; labels follow the sorted folders.

    Args:
        classnames: of the folders in their order; by default the folders' names, underscores read as spaces.

    Raises:
        DataError: a folder that is missing or without images, or another number of class names than of folders.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"root: could not read {root}: {error.strerror}") from error
    if folders and {folder.name for folder in folders} <= {"train", "val", "test"}:
        raise DataError(f"root: expected folders of classes in {root}, got {folders[0].name}; name that folder")
    names = tuple(folder.name.replace("_", " ") for folder in folders) if classnames is None else tuple(classnames)
    if len(names) != len(folders):
        raise DataError(f"classnames: expected one for each of the {len(folders)} folders in {root}, got {len(names)}")
    found: list[tuple[ImageSource, int]] = []
    keys: list[str] = []
    for label, folder in enumerate(folders):
        images = image_files(folder)
        if not images:
            raise DataError(f"root: expected images in {folder}, got none")
        found += [(image, label) for image in images]
        keys += [image.relative_to(root).as_posix() for image in images]
    return ClassifiedImages(found, tuple(keys), names)


def read_torchvision(name: str, root: Path, classnames: Sequence[str] | None = None) -> ClassifiedImages:
    """One of torchvision's data sets (`TORCHVISION`) below `root`, its test part; nothing is downloaded.

    Args:
        classnames: in the order of the labels; by default torchvision's own, which are not always words
            (`AnnualCrop`, `0 - zero`).

    Raises:
        DataError: an unknown name, or data that torchvision cannot read.
    """
    if name not in TORCHVISION:
        raise DataError(f"name: expected one of {', '.join(TORCHVISION)}, got {name!r}")
    from torchvision import datasets

    try:
        table = getattr(datasets, name)(str(root), download=False, **TORCHVISION[name])
    except (OSError, RuntimeError, ValueError, KeyError, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split()).partition(" You can use download=True")[0]
        raise DataError(f"root: torchvision could not read {name} below {root}: {reason}") from error
    own = getattr(table, "classes", None) or table.categories
    names = tuple(str(one).replace("_", " ") for one in own) if classnames is None else tuple(classnames)
    if len(names) != len(own):
        raise DataError(f"classnames: expected one for each of the {len(own)} classes of {name}, got {len(names)}")
    return ClassifiedImages(table, tuple(map(str, range(len(table)))), names)


def read_classnames(source: str | Path) -> tuple[str, ...]:
    """`imagenet` (open_clip's names, by ImageNet's labels), a text file of a name per line, or a JSON file.

    The JSON is a list, an object from folder to name, or torchvision's `{"0": ["n01440764", "tench"], …}`; the names of
    an object come in the order of its folders.

    Raises:
        DataError: a file that cannot be read, or that holds anything else; an object whose folders are numbers that
            sort otherwise as text, which says two orders.
    """
    if str(source) == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    path = Path(source)
    if path.suffix != ".json":
        return _some_lines(path)
    document = read_json(path)
    if isinstance(document, dict):
        # torchvision's index lists the folders; any other object is keyed by them.
        pairs = (value if isinstance(value, list) and len(value) == 2 else (key, value)
                 for key, value in document.items())  # fmt: skip
        by_folder = {str(folder): name for folder, name in pairs}
        folders = sorted(by_folder)
        if all(map(str.isdecimal, folders)) and folders != sorted(folders, key=int):
            raise DataError(f"classnames: the keys of {path} sort otherwise as folders than as numbers; give a list")
        document = [by_folder[folder] for folder in folders]
    if not isinstance(document, list) or not document or not all(isinstance(name, str) for name in document):
        raise DataError(f"classnames: expected a list of names in {path}, or an object from folder to name")
    return tuple(document)


def read_templates(source: str | Path) -> tuple[str, ...]:
    """Prompt templates, `{}` standing for the class name.

    Args:
        source: `photo` (`a photo of a {}.`), `simple` (CLIP's 7) or `openai` (CLIP's 80 for ImageNet), both as in
            open_clip; or a text file of a template per line, or a JSON list.

    Raises:
        DataError: a file that cannot be read, or a template without `{}`.
    """
    if str(source) == "photo":
        return ("a photo of a {}.",)
    if str(source) in ("simple", "openai"):
        import open_clip

        makers = open_clip.SIMPLE_IMAGENET_TEMPLATES if str(source) == "simple" else open_clip.OPENAI_IMAGENET_TEMPLATES
        return tuple(make("{}") for make in makers)
    path = Path(source)
    found = read_json(path) if path.suffix == ".json" else _some_lines(path)
    templates = found if isinstance(found, (list, tuple)) else [found]
    bad = [template for template in templates if not isinstance(template, str) or "{}" not in template]
    if bad or not templates:
        raise DataError(f"templates: expected lines with {{}} for the class name in {path}, got {first_names(bad)!r}")
    return tuple(templates)


def _some_lines(path: Path) -> tuple[str, ...]:
    lines = read_lines(path)
    if not lines:
        raise DataError(f"path: expected lines in {path}, got none")
    return tuple(lines)
