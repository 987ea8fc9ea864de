"""What the training commands have in common: the folder of a run, and being stopped in it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fastsds.commands.configs import FILE_NAME, is_main_process, save_config, write_whole, writing
from fastsds.training.checkpoint import latest_checkpoint
from fastsds.training.interrupt import TrainingInterrupted
from fastsds.training.processes import leave_launch, on_main_process
from fastsds.training.trainer import Trainer

BAD_IMAGES = "bad_images.jsonl"
_BEFORE_A_CHECKPOINT = {FILE_NAME, BAD_IMAGES, "metrics.jsonl", "tensorboard", "checkpoints"}


@contextmanager
def run_folder(accelerator: Accelerator, out: Path, *, resume: bool) -> Iterator[None]:
    """The folder of a run, made, and kept from other runs while it is entered.

    Raises:
        FileExistsError: it holds more than a run without a checkpoint leaves, and is not to be resumed; or another run
            is in it.
    """
    with ExitStack() as held:

        def enter() -> None:
            lost = out.is_dir() and not {path.name for path in out.iterdir()} - _BEFORE_A_CHECKPOINT
            lost = lost and latest_checkpoint(out / "checkpoints") is None
            if not lost and out.exists() and not (resume and out.is_dir()):
                raise FileExistsError(f"out: {out} exists; go on with --resume, or name another folder")
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(out))
            if lost:
                (out / BAD_IMAGES).unlink(missing_ok=True)  # they may have been mended since

        on_main_process(accelerator, enter)
        try:
            yield
            leave_launch()
        finally:
            with suppress(OSError):
                out.rmdir()  # where nothing came of the run


@contextmanager
def recorded(out: Path, config: Any, command: str) -> Iterator[None]:
    """Around what a command does once its config can serve: it lies in `out`.

    Where a run was to go on and did not, as with a config that its checkpoint does not fit, the config stays what it
    was.

    Raises:
        KeyboardInterrupt: the user interrupted; the message says how to go on.
    """
    file, checkpoints = out / FILE_NAME, out / "checkpoints"
    last = latest_checkpoint(checkpoints)
    before = file.read_text(encoding="utf-8") if last is not None and file.is_file() else None
    if is_main_process():
        save_config(file, dataclasses.replace(config, resume=False), command)
    try:
        yield
    except KeyboardInterrupt as error:
        before = None
        raise KeyboardInterrupt(str(error) or f"interrupted; {_how_to_go_on(out, command)}") from None
    finally:
        if before is not None and is_main_process() and latest_checkpoint(checkpoints) == last:
            write_whole(file, before)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a folder from others that lock it; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(f"out: another run is at work in {folder}; wait for it, or name another folder") from None
    except OSError:  # a file system that has no locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # workers that still end have the descriptor, too
        os.close(descriptor)


def fit(trainer: Trainer, command: str) -> None:
    """Trains, from the last checkpoint where there is one.

    Raises:
        KeyboardInterrupt: a signal stopped the run; the message says how to go on.
    """
    try:
        trainer.fit(resume=True)
    except TrainingInterrupted as stop:
        raise KeyboardInterrupt(
            f"stopped after step {stop.step} of {trainer.total_steps}, saved as {stop.checkpoint}; "
            f"{_how_to_go_on(trainer.config.out, command)}"
        ) from None


def _how_to_go_on(out: Path, command: str) -> str:
    return f"go on: fastsds {command} --config {shlex.quote(str(out / FILE_NAME))} --resume"
