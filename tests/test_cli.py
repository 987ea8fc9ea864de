"""The command line: what it prints, and one line for an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsds import cli
from fastsds.ops import _extension


def test_info_names_the_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "open_clip_torch", "add_noise", "sds_loss", "sample_timesteps", "reference"):
        assert word in printed


def test_info_names_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler and the torch that the module itself was compiled with."""
    module = pytest.importorskip("fastsds._C")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"the extension was built by {module.compiler} for torch {module.torch}, with " in printed


def test_info_says_what_to_do_about_another_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    another = _extension.Build(torch="2.3.1", cuda=None, problem=None)
    monkeypatch.setattr(_extension, "build", lambda: another)
    _extension.failure.cache_clear()
    try:
        assert cli.main(["info"]) == 0
    finally:
        _extension.failure.cache_clear()
    expected = f"was built for torch 2.3.1, this is torch {torch.__version__}; rebuild it with `pip install . --no-"
    assert sum(expected in line for line in capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("command", ["demo", "intcoop-demo"])
def test_demos_refuse_an_existing_folder_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--out", str(tmp_path), "--overwrite"]) == 1
    assert capsys.readouterr().err == f"fastsds: out: {tmp_path} exists; name another folder\n"


@pytest.mark.parametrize("option", ["seeds", "steps", "workers"])
def test_demo_refuses_numbers_below_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", f"--{option}", "0"]) == 1
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["seeds", "shots", "test-per-class", "workers"])
def test_intcoop_demo_refuses_numbers_below_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["intcoop-demo", f"--{option}", "0"]) == 1
    assert f"{option.replace('-', '_')}: expected at least 1, got 0" in capsys.readouterr().err


def test_attributes_names_a_missing_split_file_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = tmp_path / "split.json"
    assert cli.main(["attributes", "--images", str(tmp_path), "--split", str(split)]) == 1
    assert capsys.readouterr().err == f"fastsds: path: could not read {split}: No such file or directory\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in ("demo", "intcoop-demo", "attributes", "info"):
        assert command in printed
