from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from fastsds.data import DataError


def _write(path: Path, rows: list[list[str]], header: tuple[str, ...] = ("filepath", "title"), **options: Any) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **{"delimiter": "\t", **options}).writerows([header, *rows])
    return path


@pytest.fixture
def pairs(tmp_path: Path, pictures: Any) -> Path:
    for number in (1, 2):
        pictures.save(tmp_path / "images" / f"{number}.png", number)
    return _write(tmp_path / "pairs.csv", [["images/2.png", "a red one"], ["images/1.png", "the blue, “one”"]])


def test_pairs_come_in_the_files_order(pairs: Path, load: Any, colours: Any, pictures: Any) -> None:
    assert colours(load(pairs)) == [(pictures.colour(2), "a red one"), (pictures.colour(1), "the blue, “one”")]


def test_relative_paths_start_from_the_root_and_absolute_ones_stand(
    pairs: Path, tmp_path: Path, load: Any, colours: Any, pictures: Any
) -> None:
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    path = _write(elsewhere / "pairs.csv", [["1.png", "one"], [str(tmp_path / "images" / "1.png"), "two"]])
    found = colours(load(path, images=tmp_path / "images"))
    assert found == [(pictures.colour(1), "one"), (pictures.colour(1), "two")]
    with pytest.raises(DataError, match=r"lists.1\.png does not exist; check the data file's paths and its root"):
        load(path)[0]


def test_columns_and_separator_can_be_named(
    pairs: Path, tmp_path: Path, load: Any, colours: Any, pictures: Any
) -> None:
    rows = [["0", "a red one, large", "images/2.png"]]
    path = _write(tmp_path / "other.csv", rows, header=("id", "text", "file"), delimiter=";")
    named = {"image_column": "file", "caption_column": "text", "separator": ";"}
    assert colours(load(path, **named)) == [(pictures.colour(2), "a red one, large")]


def test_a_tab_may_be_spelled_as_shells_leave_it(pairs: Path, load: Any) -> None:
    assert list(load(pairs, separator=r"\t").captions) == list(load(pairs, separator="\t").captions)


@pytest.mark.parametrize("separator", ["", "||", "\n"])
def test_separators_that_are_none_are_refused(pairs: Path, load: Any, separator: str) -> None:
    with pytest.raises(DataError, match=r"separator: expected one character, neither a quote nor a line's end, got '"):
        load(pairs, separator=separator)


def test_byte_order_mark_is_no_part_of_the_first_column(pairs: Path, tmp_path: Path, load: Any) -> None:
    path = _write(tmp_path / "bom.csv", [["images/1.png", "one"]], encoding="utf-8-sig")
    assert list(load(path).captions) == ["one"]


def test_empty_lines_and_windows_line_ends_are_no_rows(pairs: Path, tmp_path: Path, load: Any) -> None:
    path = tmp_path / "windows.csv"
    path.write_bytes(b'filepath,title\r\n\r\nimages/1.png,"a, ""red""\r\none"\r\n\r\nimages/2.png,two\r\n\r\n')
    assert list(load(path).captions) == ['a, "red"\r\none', "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"caption_column": "text"},
            r"caption_column: .*pairs\.csv has no column 'text'; it has \['filepath', 'title'\]",
        ),
        ({"image_column": "file"}, r"image_column: .*pairs\.csv has no column 'file'; it has \['filepath', 'title'\]"),
        ({"separator": ","}, r"no column 'filepath'; it has \['filepath\\ttitle'\] when split at ','"),
    ],
)
def test_unknown_column_or_separator_lists_what_there_is(
    pairs: Path, load: Any, options: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(pairs, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no column 'filepath'; it has \[\]"),
        (b"filepath\ttitle\n", r"path: expected rows below the header of .*file\.csv, got none"),
        (b"filepath\ttitle\na.png\tone\nb.png\n", r"path: row 2 below the header of .*file\.csv has fewer columns"),
        (
            b"filepath\ttitle\na.png\tone\nb.png\ttwo\tthree\n",
            r"path: row 2 below the header of .*file\.csv has more columns than \['filepath', 'title'\]; a text w",
        ),
        (
            b'filepath\ttitle\na.png\tone\nb.png\t"The Scream\nc.png\tthree\n',
            r"path: line 4 of .*file\.csv is wrongly quoted \(unexpected end of data\); a text that begins",
        ),
        (b'filepath\ttitle\na.png\t"One" more\n', r"path: line 2 of .*file\.csv is wrongly quoted \(.* expected after"),
        ("filepath\ttitle\na.png\tcafé\n".encode("latin-1"), r"path: .*file\.csv is not a UTF-8 text file"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, load: Any, content: bytes, message: str) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_missing_file_and_folder_are_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(DataError, match=r"path: could not read .*absent\.csv: No such file"):
        load(tmp_path / "absent.csv", format="csv")
    with pytest.raises(DataError, match=r"path: could not read .*: Is a directory"):
        load(tmp_path, format="csv")
