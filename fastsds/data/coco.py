"""COCO's captions: an annotations file and a folder of images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fastsds.data.files import DataError, first_names, read_json
from fastsds.data.images import Pairs


def read_coco(path: Path, images: Path | None = None) -> Pairs:
    """Reads `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    An image has several captions; one without any is left out. Both follow the file's order.

    Args:
        images: folder of the images. By default that of COCO's own layout, `train2017` beside the folder of
            `captions_train2017.json`, where there is one, else the folder of the file.

    Raises:
        DataError: a file that cannot be read or is not of the format, an id of two images, a caption of an unknown
            image, or no captions.
    """
    document = read_json(path)
    files = _column(document, "images", {"id": int, "file_name": str}, path)
    captions: dict[int, list[str]] = {row["id"]: [] for row in files}
    if len(captions) < len(files):
        twice = [number for number, count in Counter(row["id"] for row in files).items() if count > 1]
        raise DataError(f"path: expected every id once in the images of {path}, got twice {first_names(twice)}")
    annotations = _column(document, "annotations", {"image_id": int, "caption": str}, path)
    unknown = [row["image_id"] for row in annotations if row["image_id"] not in captions]
    if unknown:
        raise DataError(
            f"path: {len(unknown)} annotations of {path} are of images that it does not list, image_id "
            f"{first_names(unknown)}"
        )
    for row in annotations:
        captions[row["image_id"]].append(row["caption"].strip())
    folder = _folder(path) if images is None else images
    found = [row for row in files if captions[row["id"]]]
    if not found:
        raise DataError(f"path: expected images with captions in {path}, got none")
    return Pairs([folder / row["file_name"] for row in found], [captions[row["id"]] for row in found])


def _column(document: Any, name: str, fields: dict[str, type], path: Path) -> list[dict[str, Any]]:
    rows = document.get(name) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"path: expected {path} to hold the lists images and annotations, {name} is none")
    for row in rows:
        if not isinstance(row, dict) or any(type(row.get(field)) is not kind for field, kind in fields.items()):
            raise DataError(
                f"path: expected {' and '.join(fields)} in every one of the {name} of {path}, got {row!r:.200}"
            )
    return rows


def _folder(path: Path) -> Path:
    coco = path.absolute().parent.parent / path.stem.removeprefix("captions_")
    return coco if coco.is_dir() else path.parent
