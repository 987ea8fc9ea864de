"""ARO (Yuksekgonul et al., ICLR 2023): relations, attributes and word order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastsds.data.files import DataError
from fastsds.evaluation.examples import CaptionChoice
from fastsds.evaluation.outcomes import Outcomes
from fastsds.evaluation.records import check_images, read_rows

_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_FIELDS: dict[str, type] = {"image_path": str, "true_caption": str, "false_caption": str, **dict.fromkeys(_BOX, int)}
ORDER_OPTIONS = 5


def read_vg_relation(path: Path, images: Path) -> list[CaptionChoice]:
    """Reads `visual_genome_relation.json`; the group is the relation.

    Images are cut to the row's box, and the right caption is the second of two, as in ARO.

    Args:
        images: folder that the rows' `image_path` start from.

    Raises:
        DataError: a file that is missing, empty or not of the format, or images that are absent.
    """
    return _read_visual_genome(path, images, "relation_name", str)


def read_vg_attribution(path: Path, images: Path) -> list[CaptionChoice]:
    """Reads `visual_genome_attribution.json`; the group is the pair of attributes, `old_wooden`.

    Like `read_vg_relation` otherwise.
    """
    return _read_visual_genome(path, images, "attributes", list)


def read_order(path: Path, images: Path) -> list[CaptionChoice]:
    """Reads COCO-Order or Flickr30k-Order with stored shuffles, as `shuffles.write_shuffles` writes them.

    Rows `{"image", "caption", "options"}`: of five options the first is the caption and right. An option that reads
    like it (a shuffle of one noun) is no alternative and left out; ARO counts it as right, too. Of wrong options that
    read alike one stays.

    Raises:
        DataError: a file that is missing, empty or not of the format, or images that are absent.
    """
    rows = read_rows(path, {"image": str, "caption": str, "options": list})
    examples: list[CaptionChoice] = []
    for number, row in enumerate(rows, start=1):
        options = row["options"]
        if len(options) != ORDER_OPTIONS or not all(isinstance(option, str) for option in options):
            raise DataError(f"path: expected {ORDER_OPTIONS} strings as options in row {number} of {path}, {options!r}")
        distinct = tuple(dict.fromkeys(options))
        if len(distinct) == 1:
            raise DataError(f"path: row {number} of {path} has no option but its caption {options[0]!r}")
        examples.append(CaptionChoice(f"{number} {row['image']}", images / row["image"], distinct, 0))
    check_images([images / row["image"] for row in rows], path)
    return examples


def with_published_macro(outcomes: Outcomes, *, smallest: int = 1, leave_out: Collection[str] = ()) -> Outcomes:
    """Adds the figure `published`: the accuracy over the groups that ARO's own macro averages are over.

    ARO leaves attribute pairs of fewer than 25 samples out (`smallest`), and relations that are symmetric or rare
    (`leave_out` names them; the list is in ARO's notebook).

    Raises:
        ValueError: no group is left.
    """
    figure = outcomes.figures["accuracy"]
    groups = figure.groups or ()
    counts = Counter(groups)
    kept = [counts[group] >= smallest and group not in leave_out for group in groups]
    if not any(kept):
        raise ValueError(f"groups: expected one of {smallest} samples that is not left out, got none of {len(counts)}")
    return Outcomes(outcomes.benchmark, {**outcomes.figures, "published": figure.subset(kept)})


def _read_visual_genome(path: Path, images: Path, group: str, kind: type) -> list[CaptionChoice]:
    rows = read_rows(path, {**_FIELDS, group: kind})
    check_images([images / row["image_path"] for row in rows], path)
    return [_choice(number, row, images, group) for number, row in enumerate(rows, start=1)]


def _choice(number: int, row: dict[str, Any], images: Path, group: str) -> CaptionChoice:
    left, upper, width, height = (row[name] for name in _BOX)
    name = row[group] if isinstance(row[group], str) else "_".join(map(str, row[group]))
    captions = (row["false_caption"], row["true_caption"])
    return CaptionChoice(
        f"{number} {row['image_path']}",
        images / row["image_path"],
        captions,
        1,
        name,
        (left, upper, left + width, upper + height),
    )
