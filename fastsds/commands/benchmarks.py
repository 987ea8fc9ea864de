"""The benchmarks of two models' choices, by name: where their examples are read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastsds.evaluation.aro import read_order, read_vg_attribution, read_vg_relation
from fastsds.evaluation.classification import (
    ClassifiedImages,
    read_class_folders,
    read_classnames,
    read_torchvision,
)
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo
from fastsds.evaluation.sugarcrepe import SPLITS, read_sugarcrepe
from fastsds.evaluation.winoground import read_winoground

AroTask = Literal["vg-relation", "vg-attribution", "coco-order", "flickr-order"]
Benchmark = Literal["winoground", "vg-relation", "vg-attribution", "coco-order", "flickr-order", "sugarcrepe"]
SugarCrepeSplit = Literal[
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"
]  # fmt: skip


def read_examples(
    benchmark: Benchmark, data: Path | str, images: Path | None, splits: Sequence[str] = SPLITS
) -> list[CaptionChoice] | list[TwoByTwo]:
    """The examples of a benchmark.

    Args:
        data: Winoground's folder or hub id, ARO's JSON, or SugarCrepe's folder of JSON files.
        images: folder that image paths start from; that of `data` by default. Winoground has its own.
        splits: of SugarCrepe.

    Raises:
        DataError: what cannot be read or is not of the format, by name.
    """
    if benchmark == "winoground":
        return read_winoground(data)
    path = Path(data)
    folder = images or (path if benchmark == "sugarcrepe" else path.parent)
    if benchmark == "sugarcrepe":
        return read_sugarcrepe(path, folder, splits)
    if benchmark == "vg-relation":
        return read_vg_relation(path, folder)
    return read_vg_attribution(path, folder) if benchmark == "vg-attribution" else read_order(path, folder)


def read_classified(data: Path, torchvision: str | None, classnames: Path | str | None) -> ClassifiedImages:
    """The images of a classification.

    Args:
        data: a folder of classes' folders, or that of torchvision's data sets.
        torchvision: one of these by its name, or None.
        classnames: `imagenet` or a file; None for the data's own.

    Raises:
        DataError: what cannot be read or is not of the format, by name.
    """
    names = None if classnames is None else read_classnames(classnames)
    return read_class_folders(data, names) if torchvision is None else read_torchvision(torchvision, data, names)
