from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import CaptionSource, DataError
from fastsds.data.source import detect_format


@pytest.mark.parametrize(
    ("files", "path", "expected"),
    [
        (["pairs.csv"], "pairs.csv", "csv"),
        (["pairs.TSV"], "pairs.TSV", "csv"),
        (["captions.json"], "captions.json", "coco"),
        (["000.tar"], "000.tar", "webdataset"),
        ([], "{000..010}.tar", "webdataset"),
        (["set/000.tar", "set/sizes.json"], "set", "webdataset"),
        (["set/state.json", "set/data-00000-of-00001.arrow"], "set", "huggingface"),
        (["set/dataset_dict.json"], "set", "huggingface"),
        (["set/data/train.parquet"], "set", "huggingface"),
        (["a.parquet"], "a.parquet", "huggingface"),
        ([], "a/*.parquet", "huggingface"),
        (["set/a.png", "set/a.txt"], "set", "folder"),
        (["set/metadata.csv"], "set", "folder"),
    ],
)
def test_formats_are_told_by_the_path(tmp_path: Path, files: list[str], path: str, expected: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert detect_format(tmp_path / path) == expected


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(DataError, match=r"path: the format of .*xlsx cannot be told from its name; name it by "):
        CaptionSource(tmp_path / "pairs.xlsx").read()
    with pytest.raises(DataError, match=r"path: nlphuji/flickr30k does not exist; a data set of the hub needs"):
        CaptionSource("nlphuji/flickr30k").read()


@pytest.mark.parametrize("separator", ["\t", ","])
def test_tables_are_split_as_their_header_is(
    tmp_path: Path, load: Any, colours: Any, pictures: Any, separator: str
) -> None:
    pictures.save(tmp_path / "images" / "a.png", 6)
    content = f'file{separator}text\na.png{separator}"six, of ten"\n'
    (tmp_path / "pairs.csv").write_text(content, encoding="utf-8")
    options = {"image_column": "file", "caption_column": "text", "images": tmp_path / "images"}
    assert colours(load(tmp_path / "pairs.csv", **options)) == [(pictures.colour(6), "six, of ten")]
    with pytest.raises(DataError, match=r"image_column: .*pairs\.csv has no column 'filepath'; it has \['file', 'text"):
        load(tmp_path / "pairs.csv")
    with pytest.raises(DataError, match=r"when split at ';'"):
        load(tmp_path / "pairs.csv", separator=";")


def test_a_table_of_truncated_images_is_not_read(tmp_path: Path, load: Any, pictures: Any) -> None:
    pictures.truncate(pictures.save(tmp_path / "a.png", 1))
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\na.png\tone\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"images: 1 of 1 cannot be read and max_bad_share=0\.0 allows 0: .*a\.png;"):
        load(tmp_path / "pairs.csv")[0]


def test_blank_captions_are_left_out(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    for number in range(3):
        pictures.save(tmp_path / f"{number}.png", number)
    (tmp_path / "pairs.csv").write_text("filepath,title\n0.png,\n1.png,one\n2.png,  \n", encoding="utf-8")
    assert colours(load(tmp_path / "pairs.csv")) == [(pictures.colour(1), "one")]
    (tmp_path / "pairs.csv").write_text("filepath,title\n0.png,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"path: expected images with captions in .*pairs\.csv, got none"):
        load(tmp_path / "pairs.csv")


def test_the_home_folder_may_be_abbreviated(
    tmp_path: Path, load: Any, colours: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures.save(tmp_path / "set" / "a.png", 1).with_suffix(".txt").write_text("one", encoding="utf-8")
    assert colours(load("~/set")) == [(pictures.colour(1), "one")]
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for path in (tmp_path / "set").iterdir():
            shard.add(path, path.name)
    assert colours(load("~/{0..0}.tar")) == [(pictures.colour(1), "one")]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "pairs.csv").write_text("filepath,title\na.png,one\n", encoding="utf-8")
    assert colours(load("~/lists/pairs.csv", images=Path("~/set"))) == [(pictures.colour(1), "one")]
