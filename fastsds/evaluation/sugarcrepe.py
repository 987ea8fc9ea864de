"""SugarCrepe (Hsieh et al., NeurIPS 2023): a caption against a fluent, sensible one that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastsds.data.files import DataError, read_json
from fastsds.evaluation.examples import CaptionChoice
from fastsds.evaluation.records import check_images, check_row

SPLITS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def read_sugarcrepe(annotations: Path, images: Path, splits: Sequence[str] = SPLITS) -> list[CaptionChoice]:
    """Reads `<split>.json`, `{id: {"filename", "caption", "negative_caption"}}`; the group is the split.

    Args:
        annotations: folder of the JSON files.
        images: COCO's val2017 folder.

    Raises:
        DataError: a split that is missing, empty or not of the format, or images that are absent.
    """
    examples: list[CaptionChoice] = []
    paths: list[Path] = []
    for split in splits:
        path = annotations / f"{split}.json"
        document = read_json(path)
        if not isinstance(document, dict) or not document:
            raise DataError(f"path: expected an object of samples in {path}, got {document!r:.40}")
        for key, row in document.items():
            check_row(row, {"filename": str, "caption": str, "negative_caption": str}, f"sample {key} of {path}")
            paths.append(images / row["filename"])
            captions = (row["caption"], row["negative_caption"])
            examples.append(CaptionChoice(f"{split}/{key}", paths[-1], captions, 0, split))
    check_images(paths, annotations)
    return examples
