from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastsds.evaluation import (
    Figure,
    Outcomes,
    bootstrap_interval,
    compare,
    read_outcomes,
    tables,
    wilson_interval,
    write_results,
)


@pytest.fixture
def before() -> Outcomes:
    groups = ("on", "on", "on", "on", "under|over", "under|over")
    keys = tuple("abcdef")
    return Outcomes(
        "toy",
        {
            "accuracy": Figure((1, 0, 0, 1, 0, 0), keys, groups, 0.5),
            "text": Figure((1, 0, 0, 0, 0, 0), keys, None, None),
        },
    )


@pytest.fixture
def after(before: Outcomes) -> Outcomes:
    accuracy = before.figures["accuracy"]
    better = Figure((1, 1, 1, 1, 1, 0), accuracy.keys, accuracy.groups, accuracy.chance)
    return Outcomes("toy", {"accuracy": better, "text": before.figures["text"]})


def _cells(markdown: str) -> list[list[str]]:
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_the_four_files_tell_the_same(tmp_path: Path, after: Outcomes) -> None:
    folder = tmp_path / "results"
    write_results(folder, after, description={"model": "ViT-B-32"}, files={"config.yaml": "a: 1\n"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "outcomes.json", "results.csv", "results.json", "results.md",
    ]  # fmt: skip
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    assert read_outcomes(folder) == after

    document = json.loads((folder / "results.json").read_text())
    assert (document["benchmark"], document["description"]) == ("toy", {"model": "ViT-B-32"})
    accuracy, text = document["figures"]["accuracy"], document["figures"]["text"]
    assert (accuracy["micro"], accuracy["macro"]) == (pytest.approx(5 / 6), pytest.approx((1 + 1 / 2) / 2))
    assert accuracy["by_group"] == {"on": 1, "under|over": 0.5}
    assert (accuracy["samples"], accuracy["groups"], accuracy["chance"]) == (6, 2, 0.5)
    hits, groups = after.figures["accuracy"].hits, after.figures["accuracy"].groups
    assert (accuracy["low"], accuracy["high"]) == bootstrap_interval(hits)
    assert (accuracy["macro_low"], accuracy["macro_high"]) == bootstrap_interval(hits, groups)
    assert text["macro"] is text["chance"] is text["groups"] is None

    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert [row["figure"] for row in rows] == ["accuracy", "text"]
    assert float(rows[0]["macro"]) == accuracy["macro"] and rows[1]["macro"] == ""

    page = (folder / "results.md").read_text()
    assert page.startswith("# toy\n\n- model: ViT-B-32\n")
    header, _, first, second = _cells(page)
    assert header == ["figure", "%", "95 % interval", "macro %", "95 % interval", "groups", "chance %", "n"]
    assert [first[at] for at in (0, 1, 3, 5, 6, 7)] == ["accuracy", "83.3", "75.0", "2", "50.0", "6"]
    assert [second[at] for at in (0, 1, 3, 5, 6, 7)] == ["text", "16.7", "", "", "", "6"]
    assert first[2] == f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"


def test_a_comparison_is_written_beside(tmp_path: Path, before: Outcomes, after: Outcomes) -> None:
    write_results(tmp_path / "results", after, comparison=compare(before, after))
    header, _, first, second = _cells((tmp_path / "results" / "results.md").read_text().split("## Before and after")[1])
    assert header[:8] == ["figure", "before %", "after %", "difference", "95 % interval", "gained", "lost", "p"]
    assert [first[at] for at in (1, 2, 3, 5, 6, 7, 8)] == ["33.3", "83.3", "+50.0", "3", "0", "0.25", "+50.0"]
    assert [second[at] for at in (3, 5, 6, 7, 8)] == ["+0.0", "0", "0", "1", ""]
    document = json.loads((tmp_path / "results" / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results" / "comparison.csv").read_text())))
    assert document["comparison"]["accuracy"]["gained"] == int(rows[0]["gained"]) == 3
    assert float(rows[0]["p_value"]) == document["comparison"]["accuracy"]["p_value"] == 2 / 2**3


def test_a_column_of_macro_appears_only_where_there_are_groups(before: Outcomes) -> None:
    table = tables.results_table(Outcomes("toy", {"text": before.figures["text"]}))
    assert _cells(table)[0] == ["figure", "%", "95 % interval", "chance %", "n"]


def test_a_figure_without_a_mistake_has_an_interval_with_a_width() -> None:
    figure = Figure((1.0,) * 20, tuple(map(str, range(20))), ("a", "b") * 10)
    table = tables.results_table(Outcomes("toy", {"accuracy": figure}))
    low, high = wilson_interval(1.0, 20)
    assert [_cells(table)[2][at] for at in (2, 4)] == [f"{100 * low:.1f} to {100 * high:.1f}"] * 2
    assert table.endswith(" Where that is a point, as where all are right: Wilson's.\n")


def test_names_cannot_break_the_table() -> None:
    figure = Figure((1, 0), ("a", "b"), ("x", "y|z"))
    table = tables.results_table(Outcomes("toy", {"accuracy": figure}).with_groups_of("accuracy"))
    assert {len(row) for row in _cells(table)} == {8}
    assert _cells(table)[-1][0] == r"y\|z"


@pytest.mark.parametrize("name", ["absent/config.yaml", "config.yaml"])
def test_all_files_or_none(tmp_path: Path, before: Outcomes, after: Outcomes, monkeypatch: Any, name: str) -> None:
    folder = tmp_path / "results"
    write_results(folder, before)
    if name == "config.yaml":  # the last of the files does not fit on the disk
        whole = Path.write_text

        def fails(path: Path, text: str, **options: Any) -> int:
            if path.name == "results.json":
                raise OSError(28, "No space left on device")
            return whole(path, text, **options)

        monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match=r"No space left|No such file"):
        write_results(folder, after, files={name: ""})
    monkeypatch.undo()
    assert read_outcomes(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    write_results(folder, after)
    assert read_outcomes(folder) == after


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, before: Outcomes) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"folder: .* holds other files than results, first thesis\.tex; name a new"):
        write_results(tmp_path, before)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
