from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import DataError


@pytest.fixture
def folder(tmp_path: Path, pictures: Any) -> Path:
    """Two images with texts, one of them in a subfolder, one image without, and a text without."""
    for name, number in (("b/two.png", 2), ("one.PNG", 1), ("alone.png", 3)):
        pictures.save(tmp_path / "set" / name, number)
    for name, text in (("b/two", "picture 2\n"), ("one", "picture 1"), ("notes", "of mine")):
        (tmp_path / "set" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "set"


def _lines(folder: Path, *rows: object) -> None:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_texts_belong_to_the_images_of_their_name(folder: Path, load: Any, colours: Any, pictures: Any) -> None:
    assert colours(load(folder)) == [(pictures.colour(2), "picture 2"), (pictures.colour(1), "picture 1")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_decide_where_there_are_some(folder: Path, load: Any, colours: Any, pictures: Any, kind: str) -> None:
    if kind == "jsonl":
        _lines(folder, {"file_name": "one.PNG", "text": "the first"}, {"file_name": "b/two.png", "text": "a, b"})
    else:
        content = 'file_name,text\none.PNG,the first\nb/two.png,"a, b"\n'
        (folder / "metadata.csv").write_text(content, encoding="utf-8")
    assert colours(load(folder)) == [(pictures.colour(1), "the first"), (pictures.colour(2), "a, b")]


def test_missing_folder_and_image_are_named(folder: Path, load: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"path: expected a folder at .*none, got nothing"):
        load(tmp_path / "none", format="folder")
    with pytest.raises(DataError, match=r"path: expected a folder at .*one\.PNG, got a file"):
        load(folder / "one.PNG", format="folder")
    _lines(folder, {"file_name": "gone.png", "text": "x"})
    with pytest.raises(DataError, match=r"image: .*set.gone\.png does not exist"):
        load(folder)[0]


def test_truncated_image_is_named(folder: Path, load: Any, pictures: Any) -> None:
    pictures.truncate(folder / "one.PNG")
    with pytest.raises(DataError, match=r"image: .*one\.PNG cannot be read"):
        load(folder)[1]


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        (
            {"caption_column": "title"},
            [{"file_name": "a", "text": "x"}],
            r"caption_column: expected a text 'title' in",
        ),
        ({}, [{"file": "a", "text": "x"}], r"image_column: expected a text 'file_name' in line 1 of .*jsonl, got .*"),
        ({}, [{"file_name": "a", "text": "x"}, "[]\n"], r"image_column: expected a text 'file_name' in line 2 of"),
        ({}, [{"file_name": "a", "text": "x"}, '{"file'], r"path: line 2 of .*metadata\.jsonl is not JSON: "),
        ({}, [], r"path: expected lines in .*metadata\.jsonl, got none"),
    ],
)
def test_metadata_of_another_form_are_refused(
    folder: Path, load: Any, options: dict[str, str], rows: list[Any], message: str
) -> None:
    _lines(folder, *rows)
    with pytest.raises(DataError, match=message):
        load(folder, **options)


def test_metadata_tables_are_read_as_tables(folder: Path, load: Any) -> None:
    (folder / "metadata.csv").write_text("file_name,title\none.PNG,x\n", encoding="utf-8")
    message = r"caption_column: .*metadata\.csv has no column 'text'; it has \['file_name', 'title'\] when split at ','"
    with pytest.raises(DataError, match=message):
        load(folder)


def test_texts_that_are_none_are_named(folder: Path, load: Any) -> None:
    (folder / "one.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"path: .*one\.txt is not a UTF-8 text: "):
        load(folder)


def test_empty_folders_are_named(tmp_path: Path, load: Any, pictures: Any) -> None:
    pictures.save(tmp_path / "set" / "alone.png", 1)
    with pytest.raises(DataError, match=r"path: expected images with a \.txt of the same name in .*set, got none"):
        load(tmp_path / "set")


def test_what_notebooks_and_macos_leave_behind_is_passed_over(folder: Path, load: Any, pictures: Any) -> None:
    for name in ("._one.png", ".ipynb_checkpoints/one.png", "b/.two.png"):
        pictures.save(folder / name, 5).with_suffix(".txt").write_text("copy", encoding="utf-8")
    assert [row["captions"] for row in map(load(folder).__getitem__, range(2))] == ["picture 2", "picture 1"]
    assert len(load(folder)) == 2


def test_metadata_may_hold_any_character_and_blank_lines(folder: Path, load: Any) -> None:
    row = json.dumps({"file_name": "one.PNG", "text": "a\u2028b"}, ensure_ascii=False)
    _lines(folder, row + "\r\n", "\n", {"file_name": "b/two.png", "text": "two"}, "\n")
    assert list(load(folder).captions) == ["a\u2028b", "two"]


def test_texts_may_begin_with_a_byte_order_mark(folder: Path, load: Any) -> None:
    (folder / "one.txt").write_text("picture 1", encoding="utf-8-sig")
    assert list(load(folder).captions) == ["picture 2", "picture 1"]


def test_linked_folders_and_files_are_read_once_in_their_place(
    folder: Path, load: Any, pictures: Any, tmp_path: Path
) -> None:
    pictures.save(tmp_path / "elsewhere" / "a" / "three.png", 3).with_suffix(".txt").write_text("picture 3")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "c" / "a" / "loop").symlink_to(folder)
    (folder / "d.png").symlink_to(folder / "one.PNG")
    (folder / "d.txt").symlink_to(folder / "one.txt")
    assert list(load(folder).captions) == ["picture 2", "picture 3", "picture 1", "picture 1"]


def test_a_subfolder_that_cannot_be_read_is_named(folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing without a word. Permissions do not stop the root user, whom tests may run as."""
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"path: could not read .*set.b: Permission denied"):
        load(folder)
