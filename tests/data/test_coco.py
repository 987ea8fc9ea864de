from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import CaptionSource, DataError


@pytest.fixture
def coco(tmp_path: Path, pictures: Any) -> Path:
    """COCO's own layout; image 9 has captions 0 and 2, image 4 has 1, image 7 none."""
    document = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": 9, "file_name": "000000000009.png", "height": 24, "width": 24, "license": 3},
            {"id": 7, "file_name": "000000000007.png", "height": 24, "width": 24, "license": 3},
            {"id": 4, "file_name": "000000000004.png", "height": 24, "width": 24, "license": 3},
        ],
        "annotations": [
            {"image_id": 9, "id": 11, "caption": "nine, first"},
            {"image_id": 4, "id": 12, "caption": " four\n"},
            {"image_id": 9, "id": 13, "caption": "nine, second"},
        ],
    }
    for number in (9, 7, 4):
        pictures.save(tmp_path / "train2017" / f"{number:012}.png", number)
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def _change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_every_pair_is_a_row_where_all_are_wanted(coco: Path, load: Any, colours: Any, pictures: Any) -> None:
    assert colours(load(coco, captions_per_image="all")) == [
        (pictures.colour(9), "nine, first"),
        (pictures.colour(9), "nine, second"),
        (pictures.colour(4), "four"),
    ]


def test_an_epoch_has_one_caption_of_every_image(coco: Path, load: Any, colours: Any, pictures: Any) -> None:
    dataset = load(coco)
    seen = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        rows = colours(dataset)
        assert [colour for colour, _ in rows] == [pictures.colour(9), pictures.colour(4)]
        assert rows[1][1] == "four"
        seen.append(rows[0][1])
    assert {text: seen.count(text) > 8 for text in seen} == {"nine, first": True, "nine, second": True}

    def again(seed: int) -> list[str]:
        other = load(coco, seed=seed)
        return [(other.set_epoch(epoch), other[0]["captions"])[1] for epoch in range(40)]

    assert again(0) == seen and again(1) != seen


def test_images_may_lie_elsewhere(coco: Path, load: Any, colours: Any, tmp_path: Path) -> None:
    expected = colours(load(coco))
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    assert colours(load(coco, images=tmp_path / "pictures")) == expected
    flat = coco.rename(tmp_path / "pictures" / "some.json")
    assert colours(load(flat)) == expected


def test_missing_file_and_image_are_named(coco: Path, load: Any, tmp_path: Path) -> None:
    (tmp_path / "train2017" / "000000000009.png").unlink()
    with pytest.raises(DataError, match=r"image: .*train2017.000000000009\.png does not exist; check the data file's"):
        load(coco)[0]
    with pytest.raises(DataError, match=r"path: could not read .*none\.json: No such file"):
        load(tmp_path / "none.json", format="coco")


def test_truncated_image_is_named(coco: Path, load: Any, pictures: Any, tmp_path: Path) -> None:
    pictures.truncate(tmp_path / "train2017" / "000000000004.png")
    with pytest.raises(DataError, match=r"image: .*000000000004\.png cannot be read \(.*\); replace it or take"):
        load(coco)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"path: expected .*2017\.json to hold the lists images and annotations, images is none"),
        ({"annotations": {}}, r"to hold the lists images and annotations, annotations is none"),
        (
            {"annotations": [{"image_id": 9, "text": "nine"}]},
            r"path: expected image_id and caption in every one of the annotations of .*, got .*'text': 'nine'\}$",
        ),
        ({"images": [{"id": "9", "file_name": "a"}]}, r"expected id and file_name in every one of the images of .*'9'"),
        (
            {"images": [{"id": number, "file_name": f"{number}.png"} for number in (9, 4, 9)]},
            r"path: expected every id once in the images of .*2017\.json, got twice 9$",
        ),
        ({"annotations": [{"image_id": 9, "segmentation": [0] * 999}]}, r"of the annotations of .*, got .{200}$"),
        ({"annotations": []}, r"path: expected images with captions in .*2017\.json, got none"),
        (
            {"annotations": [{"image_id": number, "caption": "x"} for number in (9, 5, 6)]},
            r"path: 2 annotations of .*2017\.json are of images that it does not list, image_id 5, 6$",
        ),
    ],
)
def test_documents_of_another_form_are_refused(coco: Path, load: Any, changes: dict[str, Any], message: str) -> None:
    _change(coco, **changes)
    with pytest.raises(DataError, match=message):
        load(coco)


@pytest.mark.parametrize("content", ["", '{"images": [', "filepath\ttitle\n"])
def test_files_that_are_not_json_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "captions.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"path: .*captions\.json is not JSON"):
        CaptionSource(tmp_path / "captions.json").read()


def test_annotations_are_found_from_their_own_folder(
    coco: Path, load: Any, colours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = colours(load(coco, captions_per_image="all"))
    monkeypatch.chdir(coco.parent)
    assert colours(load(Path(coco.name), captions_per_image="all")) == expected


def test_a_byte_order_mark_is_no_part_of_the_document(coco: Path, load: Any, colours: Any) -> None:
    expected = colours(load(coco, captions_per_image="all"))
    coco.write_text(coco.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert colours(load(coco, captions_per_image="all")) == expected
