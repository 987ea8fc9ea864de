from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from fastsds.data import DataError, collate_captions

datasets = pytest.importorskip("datasets")


def _table(pictures: Any, numbers: list[int], **columns: Any) -> Any:
    features = {"image": datasets.Image(), **columns.pop("features", {"caption": datasets.Value("string")})}
    images = [{"bytes": pictures.encoded(number), "path": None} for number in numbers]
    data = {"image": images, "caption": [f"picture {number}" for number in numbers], **columns}
    return datasets.Dataset.from_dict({name: data[name] for name in features}, features=datasets.Features(features))


def _expected(pictures: Any, numbers: list[int]) -> list[tuple[list[int], str]]:
    return [(pictures.colour(number), f"picture {number}") for number in numbers]


@pytest.fixture
def saved(tmp_path: Path, pictures: Any) -> Path:
    _table(pictures, [5, 2, 8]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_tables_are_read(saved: Path, load: Any, colours: Any, pictures: Any) -> None:
    assert colours(load(saved)) == _expected(pictures, [5, 2, 8])


def test_saved_splits_are_told_apart(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    splits = {"train": _table(pictures, [1, 2]), "validation": _table(pictures, [3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert colours(load(tmp_path / "saved")) == _expected(pictures, [1, 2])
    assert colours(load(tmp_path / "saved", split="validation")) == _expected(pictures, [3])
    with pytest.raises(DataError, match=r"split: .*saved has no split 'test'; it has \['train', 'validation'\]"):
        load(tmp_path / "saved", split="test")


def test_parquet_is_read(
    tmp_path: Path, load: Any, colours: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    _table(pictures, [4, 1]).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    _table(pictures, [9]).to_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet")
    assert colours(load(tmp_path / "set" / "data" / "train-00001-of-00002.parquet")) == _expected(pictures, [9])
    assert colours(load(tmp_path / "set")) == _expected(pictures, [4, 1, 9])
    (tmp_path / "set" / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"path: .*set is absent, empty or damaged, as a Hugging Face data") as caught:
        load(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_lists_of_captions_are_drawn_from_or_made_rows(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    texts = [["one", "another"], ["three"]]
    features = {"captions": datasets.Sequence(datasets.Value("string"))}
    _table(pictures, [6, 3], captions=texts, features=features).save_to_disk(tmp_path / "saved")
    rows = colours(load(tmp_path / "saved", captions_per_image="all"))
    assert rows == [(pictures.colour(6), "one"), (pictures.colour(6), "another"), (pictures.colour(3), "three")]
    one = load(tmp_path / "saved")
    assert len(one) == 2 and one[0]["captions"] in texts[0] and one[1]["captions"] == "three"


@pytest.mark.parametrize("kind", ["binary", "path"])
def test_images_may_be_bytes_or_paths(tmp_path: Path, load: Any, colours: Any, pictures: Any, kind: str) -> None:
    images = [
        pictures.encoded(number) if kind == "binary" else str(pictures.save(tmp_path / f"{number}.png", number))
        for number in (7, 4)
    ]
    value = datasets.Value("binary" if kind == "binary" else "string")
    features = {"picture": value, "caption": datasets.Value("string")}
    table = datasets.Dataset.from_dict(
        {"picture": images, "caption": ["picture 7", "picture 4"]}, features=datasets.Features(features)
    )
    table.save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved", image_column="picture")
    assert colours(dataset) == _expected(pictures, [7, 4])
    if kind == "path":
        (tmp_path / "4.png").unlink()
        with pytest.raises(DataError, match=r"image: picture of row 1 \(.*4\.png\) does not exist; check the data"):
            dataset[1]


def test_workers_read_the_same(saved: Path, load: Any) -> None:
    loader = DataLoader(load(saved), 3, num_workers=2, collate_fn=collate_captions)
    assert next(iter(loader))["captions"] == ["picture 5", "picture 2", "picture 8"]


def test_missing_data_is_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(DataError, match=r"path: .*none does not exist; a data set of the hub needs format huggingface"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match=r"path: .*none is absent, empty or damaged, as a Hugging Face"):
        load(tmp_path / "none", format="huggingface")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, r"image_column: .*saved has no column 'picture'; it has \['image', 'caption'\]"),
        ({"caption_column": "title"}, r"caption_column: .*saved has no column 'title'; it has \['image', 'caption'\]"),
        ({"caption_column": "image"}, r"caption_column: expected texts in 'image' of .*saved, got "),
    ],
)
def test_wrong_columns_list_what_there_is(saved: Path, load: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(saved, **options)


def test_columns_that_hold_no_images_are_named(tmp_path: Path, load: Any) -> None:
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"image_column: expected images in 'image' of .*saved, got Value\('int64'\)"):
        load(tmp_path / "saved")


def test_truncated_and_lacking_images_are_named(tmp_path: Path, load: Any, pictures: Any) -> None:
    images = [
        {"bytes": pictures.encoded(0)[:-30], "path": "a.png"},
        None,
    ]
    _table(pictures, [0, 1], image=images).save_to_disk(tmp_path / "saved")
    dataset = load(tmp_path / "saved")
    for row, message in enumerate(
        (
            r"image: image of row 0 \(a\.png\) cannot be read",
            r"image: image of row 1 cannot be read \(the row is empty\)",
        )
    ):
        with pytest.raises(DataError, match=message):
            dataset[row]


def test_damaged_folders_are_named(saved: Path, load: Any) -> None:
    (saved / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"path: .*saved is absent, empty or damaged, as a Hugging Face data set it"):
        load(saved)


def test_empty_tables_are_named(tmp_path: Path, load: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _table(pictures, []).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(
        DataError, match=r"path: .*none\.parquet is absent, empty or damaged, as a Hugging Face data set"
    ):
        load(tmp_path / "none.parquet")


def test_the_missing_library_is_named_with_the_extra(saved: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"^format: huggingface needs `datasets`: pip install 'fastsds\[huggingface\]'$"
    ):
        load(saved)


def test_rows_without_a_caption_are_left_out(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    _table(pictures, [1, 2, 3], caption=["picture 1", None, "picture 3"]).save_to_disk(tmp_path / "saved")
    assert colours(load(tmp_path / "saved")) == _expected(pictures, [1, 3])
    texts = [[], ["picture 5", " "]]
    features = {"captions": datasets.Sequence(datasets.Value("string"))}
    _table(pictures, [4, 5], captions=texts, features=features).save_to_disk(tmp_path / "lists")
    assert colours(load(tmp_path / "lists")) == _expected(pictures, [5])


def test_relative_paths_start_from_the_images_folder(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    pictures.save(tmp_path / "pictures" / "7.png", 7)
    datasets.Dataset.from_dict({"image": ["7.png"], "caption": ["picture 7"]}).save_to_disk(tmp_path / "saved")
    assert colours(load(tmp_path / "saved", images=tmp_path / "pictures")) == _expected(pictures, [7])
