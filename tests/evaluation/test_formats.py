"""Every benchmark's files in miniature, in genuine layout, read wrong in five ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import DataError
from fastsds.evaluation import (
    read_captioned_images,
    read_order,
    read_sugarcrepe,
    read_vg_attribution,
    read_vg_relation,
    read_winoground,
)
from fastsds.evaluation.examples import Pictures


@dataclass
class Miniature:
    """A benchmark of two samples below a folder."""

    document: Any
    file: str
    """The annotations."""
    column: str
    """A field that the format needs."""
    images: list[str]
    read: Callable[[Path], Any]
    """From the folder to what `Pictures` takes."""
    empty: Any = field(default_factory=list)
    empty_message: str = "expected a list of rows in .*{file}, got an empty list"
    column_message: str = "of .*{file} has no field '{column}'; it has "
    json_message: str = "path: .*{file} is not JSON"
    missing_message: str = "path: could not read .*{file}: No such file"

    def write(self, root: Path, paint: Any) -> None:
        for name, colour in zip(self.images, ("red", "blue", "green", "white"), strict=False):
            paint(root / name, colour)
        self.write_annotations(root, self.document)

    def write_annotations(self, root: Path, document: Any) -> None:
        path = root / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.suffix == ".jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in document) if lines else json.dumps(document))


def _winoground(number: int) -> dict[str, Any]:
    return {
        "id": number, "image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1",
        "caption_0": "a dog on a cat", "caption_1": "a cat on a dog",
        "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object",
    }  # fmt: skip


def _visual_genome(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "image_id": "1", "image_path": name, "true_caption": "the dog is on the cat",
        "false_caption": "the cat is on the dog", "bbox_x": 1, "bbox_y": 0, "bbox_w": 4, "bbox_h": 3, **fields,
    }  # fmt: skip


_SUGAR = {"filename": "000000000139.png", "caption": "a man sits", "negative_caption": "a man stands"}
_SENTENCES = [{"raw": f"caption {number}", "tokens": ["caption"], "imgid": 0, "sentid": number} for number in range(5)]
_EMPTY_OBJECT = "expected an object of samples in .*{file}, got {{}}"

FORMATS = {
    "winoground": Miniature(
        [_winoground(0), _winoground(1)], "examples.jsonl", "caption_1",
        [f"images/ex_{number}_img_{side}.png" for number in (0, 1) for side in (0, 1)], read_winoground,
        json_message="path: .*{file} is not JSON line by line",
        missing_message=r"source: expected examples\.jsonl, data/examples\.jsonl or parquet files in .*, got none",
    ),
    "winoground below data": Miniature(
        [_winoground(0), _winoground(1)], "data/examples.jsonl", "image_0",
        [f"data/images/ex_{number}_img_{side}.png" for number in (0, 1) for side in (0, 1)], read_winoground,
        json_message="path: .*{file} is not JSON line by line",
        missing_message=r"source: expected examples\.jsonl, data/examples\.jsonl or parquet files in .*, got none",
    ),
    "vg relation": Miniature(
        [_visual_genome("a.png", relation_name="on"), _visual_genome("b.png", relation_name="under")],
        "visual_genome_relation.json", "relation_name", ["images/a.png", "images/b.png"],
        lambda root: read_vg_relation(root / "visual_genome_relation.json", root / "images"),
    ),
    "vg attribution": Miniature(
        [_visual_genome(f"{name}.png", attributes=["old", "wooden"], obj1_name="door") for name in "ab"],
        "visual_genome_attribution.json", "bbox_w", ["images/a.png", "images/b.png"],
        lambda root: read_vg_attribution(root / "visual_genome_attribution.json", root / "images"),
    ),
    "order": Miniature(
        [{"image": f"val2014/{name}.png", "caption": "A b c.", "options": ["a b c", "b a c", "c b a", "b c a", "c a b"]}
         for name in "ab"],
        "coco_order.json", "options", ["val2014/a.png", "val2014/b.png"],
        lambda root: read_order(root / "coco_order.json", root),
    ),
    "sugarcrepe": Miniature(
        {"0": _SUGAR, "7": {**_SUGAR, "filename": "000000000724.png"}}, "swap_att.json", "negative_caption",
        ["val2017/000000000139.png", "val2017/000000000724.png"],
        lambda root: read_sugarcrepe(root, root / "val2017", ["swap_att"]),
        {}, _EMPTY_OBJECT, "sample 0 of .*{file} has no field '{column}'; it has ",
    ),
    "karpathy test": Miniature(
        [{"image": f"val2014/{name}.png", "caption": [f"caption {number}" for number in range(5)]} for name in "ab"],
        "coco_karpathy_test.json", "caption", ["val2014/a.png", "val2014/b.png"],
        lambda root: read_captioned_images(root / "coco_karpathy_test.json", root).images,
        [], r"expected a list of rows, or objects `images` and `annotations`, in .*{file}, got \[\]",
    ),
    "karpathy's own": Miniature(
        {"images": [{"filepath": "val2014", "filename": f"{name}.png", "split": "test", "sentences": _SENTENCES}
                    for name in "ab"], "dataset": "coco"},
        "dataset_coco.json", "split", ["val2014/a.png", "val2014/b.png"],
        lambda root: read_captioned_images(root / "dataset_coco.json", root).images,
        {"images": []}, r"split: expected one of \[\] of .*{file}, got 'test'",
        "image 1 of .*{file} has no field '{column}'; it has ",
    ),
    "coco captions": Miniature(
        {"images": [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("ab")],
         "annotations": [{"id": number, "image_id": number % 2, "caption": f"c {number}"} for number in range(4)]},
        "annotations/captions_val2017.json", "file_name", ["val2017/a.png", "val2017/b.png"],
        lambda root: read_captioned_images(root / "annotations/captions_val2017.json", root / "val2017").images,
        {"images": [], "annotations": []}, "expected images with captions in .*{file}, got none",
        "expected id and {column} in every one of the images of .*{file}",
    ),
}  # fmt: skip


@pytest.fixture(params=FORMATS)
def miniature(request: pytest.FixtureRequest, tmp_path: Path, paint: Any) -> Miniature:
    found = FORMATS[request.param]
    found.write(tmp_path, paint)
    return found


def _fails(miniature: Miniature, root: Path, message: str) -> None:
    filled = message.format(file=re.escape(miniature.file), column=miniature.column)
    with pytest.raises(DataError, match=filled) as caught:
        _ = Pictures(miniature.read(root))[:]
    assert "\n" not in str(caught.value)


def test_every_image_is_found(miniature: Miniature, tmp_path: Path) -> None:
    pictures = Pictures(miniature.read(tmp_path))
    assert [picture.getpixel((0, 0)) for picture in pictures[: len(miniature.images)]] == [
        (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255),
    ][: len(pictures)]  # fmt: skip


def test_missing_annotations_are_named(miniature: Miniature, tmp_path: Path) -> None:
    (tmp_path / miniature.file).unlink()
    _fails(miniature, tmp_path, miniature.missing_message)


def test_missing_images_are_counted_and_named(miniature: Miniature, tmp_path: Path) -> None:
    (tmp_path / miniature.images[1]).unlink()
    first = re.escape(miniature.images[1])
    _fails(miniature, tmp_path, f"images: 1 of the {len(miniature.images)} images of .* are absent, first .*{first}; ")


def test_a_truncated_image_is_named(miniature: Miniature, tmp_path: Path) -> None:
    path = tmp_path / miniature.images[0]
    path.write_bytes(path.read_bytes()[:50])
    _fails(miniature, tmp_path, f"image: .*{re.escape(miniature.images[0])} cannot be read")


def test_bad_json_is_named(miniature: Miniature, tmp_path: Path) -> None:
    path = tmp_path / miniature.file
    path.write_text(path.read_text()[:-4])
    _fails(miniature, tmp_path, miniature.json_message)


def test_an_empty_set_is_named(miniature: Miniature, tmp_path: Path) -> None:
    miniature.write_annotations(tmp_path, miniature.empty)
    _fails(miniature, tmp_path, miniature.empty_message)


def test_a_lacking_column_is_named(miniature: Miniature, tmp_path: Path) -> None:
    path = tmp_path / miniature.file
    path.write_text(path.read_text().replace(f'"{miniature.column}":', '"other":'))
    _fails(miniature, tmp_path, miniature.column_message)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("winoground", '"caption_0": "a dog on a cat"', '"caption_0": 3', "'caption_0' of row 1 .* be str, got 3"),
        ("vg relation", '"bbox_w": 4', '"bbox_w": 0', r"box: expected for '1 a\.png' left .* got \[1, 0, 1, 3\]"),
        ("vg relation", '"bbox_x": 1', '"bbox_x": "1"', "expected 'bbox_x' of row 1 of .* to be int, got '1'"),
        ("order", ', "c a b"', "", r"expected 5 strings as options in row 1 of .*coco_order\.json"),
        ("sugarcrepe", '"caption": "a man sits"', '"caption": null', "expected 'caption' of sample 0 .* str, got None"),
        ("karpathy's own", '"split": "test"', '"split": "val"', r"split: expected one of \['val'\] of .*, got 'test'"),
        ("karpathy's own", '"filepath": "val2014"', '"filepath": 4', "expected 'filepath' of image 1 .* str, got 4"),
        ("karpathy test", '["caption 0", "caption 1", "caption 2", "caption 3", "caption 4"]', "[]",
         "captions: expected at least one for each of at least one image, got 2 images, 0 with captions"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(tmp_path: Path, paint: Any, name: str, old: str, new: str, message: str) -> None:
    FORMATS[name].write(tmp_path, paint)
    path = tmp_path / FORMATS[name].file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        FORMATS[name].read(tmp_path)
