"""What becomes of a measurement whose comparison is impossible, or is with what it replaces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fastsds.commands.configs import writing
from fastsds.commands.results import check_places, save_results
from fastsds.evaluation import Figure, Outcomes, read_outcomes
from fastsds.toyworld.runs import refuse_existing


def _outcomes(**hits: int) -> Outcomes:
    return Outcomes("toy", {"accuracy": Figure(tuple(hits.values()), tuple(hits), None, 0.5)})


def test_results_outlive_a_comparison_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation takes hours; that the other was of a part of its samples is found at its end."""
    save_results(tmp_path / "before", _outcomes(a=1, b=0))
    outcomes = _outcomes(a=1, b=1, c=0)
    with pytest.raises(ValueError, match=r"only the first has none and only the second 1 \(c\)"):
        save_results(tmp_path / "after", outcomes, before=tmp_path / "before")
    assert read_outcomes(tmp_path / "after") == outcomes
    assert "66.7" in capsys.readouterr().out


def test_results_are_compared_with_those_they_replace(tmp_path: Path) -> None:
    save_results(tmp_path, _outcomes(a=1, b=0))
    save_results(tmp_path, _outcomes(a=1, b=1), before=tmp_path)
    comparison = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["comparison"]["accuracy"]
    assert (comparison["gained"], comparison["lost"], comparison["difference"]) == (1, 0, 0.5)


def test_a_disk_that_refuses_is_named_and_the_table_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match=r"^out: could not write .*after: No space left on device$"):
        save_results(tmp_path / "after", _outcomes(a=1, b=1, c=0))
    assert list(tmp_path.iterdir()) == []
    assert "66.7" in capsys.readouterr().out


def test_what_is_said_of_a_place_is_not_said_again(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"^out: it exists$"), writing(tmp_path):
        raise FileExistsError("out: it exists")
    with pytest.raises(OSError, match=f"^out: could not write {tmp_path}: disk full$"), writing(tmp_path):
        raise SafetensorError("disk full")


def test_places_that_cannot_be_written_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=r"^out: .*results cannot be written, .*file is read-only or no folder"):
        check_places(tmp_path / "file/results", None)
    check_places(tmp_path / "new/results", None)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write everywhere
    for refuses in (lambda out: check_places(out, None), lambda out: refuse_existing(out, overwrite=True)):
        with pytest.raises(PermissionError, match=r"^out: .*new/results cannot be written"):
            refuses(tmp_path / "new/results")
