"""A run's folder: who may write in it, and which config lies there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from fastsds.commands.runs import recorded, run_folder


@dataclass(frozen=True)
class Config:
    lr: float
    resume: bool = False


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def checkpoint(out: Path, step: int) -> None:
    (out / f"checkpoints/step-{step:08d}").mkdir(parents=True)


def lr(out: Path) -> float:
    return float(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["lr"])


def test_one_run_at_a_time(accelerator: Accelerator, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with run_folder(accelerator, out, resume=False):
        (out / "config.yaml").touch()
        for resume in (False, True):
            with (
                pytest.raises(FileExistsError, match=r"out: another run is at work in .*run; wait for it"),
                run_folder(accelerator, out, resume=resume),
            ):
                raise AssertionError
    with run_folder(accelerator, out, resume=False):
        pass


def test_a_run_that_came_to_nothing_leaves_nothing(accelerator: Accelerator, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder(accelerator, tmp_path / "run", resume=False):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_starts_anew(accelerator: Accelerator, tmp_path: Path, resume: bool) -> None:
    """Also where it had begun to train; its bad images may have been mended."""
    for name in ("config.yaml", "metrics.jsonl", "bad_images.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "checkpoints/.step-00000002.partial").mkdir(parents=True)
    with run_folder(accelerator, tmp_path, resume=resume):
        assert not (tmp_path / "bad_images.jsonl").exists()


@pytest.mark.parametrize("name", ["checkpoints/step-00000002", "results", "pictures"])
def test_what_a_folder_holds_is_not_overwritten(accelerator: Accelerator, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bad_images.jsonl").touch()
    with pytest.raises(FileExistsError, match="exists; go on"), run_folder(accelerator, tmp_path, resume=False):
        raise AssertionError
    with run_folder(accelerator, tmp_path, resume=True):
        assert (tmp_path / "bad_images.jsonl").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_folder(accelerator: Accelerator, tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match="exists"), run_folder(accelerator, tmp_path / "run", resume=resume):
        raise AssertionError


def test_a_run_that_does_not_go_on_keeps_its_config(tmp_path: Path) -> None:
    config = Config(1.0)
    with recorded(tmp_path, config, "distill"):
        assert lr(tmp_path) == 1
        checkpoint(tmp_path, 1)
    other = dataclasses.replace(config, lr=2.0, resume=True)
    with pytest.raises(ZeroDivisionError), recorded(tmp_path, other, "distill"):
        raise ZeroDivisionError  # as where the checkpoint does not fit
    assert lr(tmp_path) == 1
    with recorded(tmp_path, other, "distill"):
        pass  # as where nothing was left to do
    assert lr(tmp_path) == 1
    with recorded(tmp_path, other, "distill"):
        checkpoint(tmp_path, 2)
    assert lr(tmp_path) == 2


def test_how_an_interrupted_run_goes_on_can_be_pasted(tmp_path: Path) -> None:
    """And with the options that it was to go on with."""
    out = tmp_path / "my run"
    checkpoint(out, 1)
    go_on = f"interrupted; go on: fastsds distill --config '{out / 'config.yaml'}' --resume"
    with pytest.raises(KeyboardInterrupt, match=go_on), recorded(out, Config(2.0), "distill"):
        raise KeyboardInterrupt
    assert lr(out) == 2
