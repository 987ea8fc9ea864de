"""The command line: what it prints, how it starts, and one line for an error."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastsds
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


@pytest.mark.parametrize(
    ("command", "option"),
    [("demo", "seeds"), ("demo", "steps"), ("demo", "workers")]
    + [("intcoop-demo", option) for option in ("seeds", "shots", "test-per-class", "workers")],
)
def test_demos_refuse_numbers_below_one(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, f"--{option}", "0"]) == 2
    said = f"{option.replace('-', '_')}: expected at least 1, got 0; see fastsds {command} --help"
    assert capsys.readouterr().err == f"fastsds: {said}\n"


def test_attributes_names_a_missing_split_file_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = tmp_path / "split.json"
    assert cli.main(["attributes", "--images", str(tmp_path), "--split", str(split)]) == 1
    assert capsys.readouterr().err == f"fastsds: path: could not read {split}: No such file or directory\n"


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_the_commands(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr().out
    for command, entry in cli.COMMANDS.items():
        assert command.split()[0] in printed
        assert " " in command or entry.summary in printed


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: fastsds {command} " in printed
    assert "--config FILE.yaml" in printed
    assert f"\n  fastsds {command}" in printed or command == "info"  # examples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demos"], "demos: there is no such command; did you mean demo?"),
        (["xyz"], "xyz: there is no such command; see fastsds --help"),
    ],
)
def test_unknown_commands_are_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"fastsds: {message}\n"


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--sees", "3"]) == 2
    said = "Unrecognized options: --sees, 3; did you mean --seeds?; see fastsds demo --help"
    assert capsys.readouterr().err == f"fastsds: {said}\n"


def test_options_that_are_missing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "--batch-size", "4"]) == 2
    said = "expected --clip.name and --captions.path, got none; see fastsds distill --help"
    assert capsys.readouterr().err == f"fastsds: {said}\n"


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [("--train.steps", "five", "None or INT"), ("--sds.t-range", "9", "None or INT INT")],
)
def test_options_of_another_type_are_named(
    option: str, given: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ["--clip.name", "toyworld", "--captions.path", "captions.json"]
    assert cli.main(["distill", *needed, option, given]) == 2
    said = f"{option}: expected {expected}, got '{given}'; see fastsds distill --help"
    assert capsys.readouterr().err == f"fastsds: {said}\n"


@pytest.mark.parametrize("device", ["gpu", "meta:9:9"])
def test_devices_that_are_not_here_are_named(device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    words = ["evaluate", "zeroshot", "--clip.name", "toyworld", "--data", str(tmp_path), "--device", device]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastsds: device: expected auto, cpu or a device that is here, got {device!r}: ")
    assert error.count("\n") == 1


def test_who_reads_no_further_sees_no_error() -> None:
    """The output is more than a pipe holds."""
    code = """
import sys
from fastsds import cli
from fastsds.commands import info
info.run_info = lambda _: print("x" * (1 << 20))
sys.exit(cli.main(["info"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_a_terminal_that_lacks_characters_is_no_error() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = [sys.executable, "-m", "fastsds", "demö"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fastsds: dem\\xf6: there is no such command; did you mean demo?\n"


def test_warnings_of_ours_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    own = warnings.formatwarning(UserWarning("attention: no xformers"), UserWarning, cli.__file__, 1)
    assert own == "fastsds: attention: no xformers\n"
    others = warnings.formatwarning(UserWarning("text"), UserWarning, __file__, 1)
    assert others.startswith(f"{__file__}:1: UserWarning: text")


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(
    place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--out", str(tmp_path)]
    assert cli.main([*arguments[:place], "--debug", *arguments[place:]]) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert f"FileExistsError: out: {tmp_path} exists" in printed


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("lr: expected\n  a number"), 1, "lr: expected a number"),
        (ZeroDivisionError("division"), 1, "ZeroDivisionError: division; --debug shows where"),
        (AssertionError(), 1, "AssertionError; --debug shows where"),
        (BrokenPipeError(32, "Broken pipe"), 1, "Broken pipe"),  # of another pipe than the output
        (OSError(28, "No space left on device", "x/y"), 1, "x/y: No space left on device"),
        (OSError("out: could not write x"), 1, "out: could not write x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("saved; go on with --resume"), 130, "saved; go on with --resume"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, status: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("fastsds.commands.info.run_info", fail)
    assert cli.main(["info"]) == status
    assert capsys.readouterr().err == f"fastsds: {message}\n"


def test_other_processes_say_which_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"fastsds, process 1: out: {tmp_path} exists; name another folder\n"
    assert cli.main(["demo", "--sees", "3"]) == 2
    assert capsys.readouterr().err == ""


def test_listing_commands_and_info_import_no_model_library() -> None:
    code = """
import sys
import warnings
from fastsds import cli
assert cli.main(["--help"]) == 0
assert "torch" not in sys.modules
assert cli.main(["info"]) == 0
heavy = {"diffusers", "open_clip", "transformers", "accelerate", "datasets"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fastsds", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"fastsds {fastsds.__version__}\n")


def test_attributes_asks_no_hub_for_what_is_no_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "train/cat/1.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    assert cli.main(["attributes", "--images", str(tmp_path), "--model", "blip2"]) == 1
    assert capsys.readouterr().err == "fastsds: model: blip2 is no folder, and no hub id (org/model)\n"


def test_open_clips_deprecated_calls_are_not_the_users_concern() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.main(["--version"]) == 0
        for module in ("open_clip.loss", "users.own"):
            warnings.warn_explicit("all_gather is deprecated", FutureWarning, "loss.py", 51, module=module)
    assert len(seen) == 1
