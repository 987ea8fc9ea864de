"""What the training commands have in common: the folder of a run, and being stopped in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from fastsds.commands.configs import FILE_NAME
from fastsds.training.interrupt import TrainingInterrupted
from fastsds.training.processes import on_main_process
from fastsds.training.trainer import Trainer

BAD_IMAGES = "bad_images.jsonl"


def open_run(accelerator: Accelerator, out: Path, *, resume: bool) -> None:
    """
    Raises:
        FileExistsError: the run's folder holds more than a run that never trained leaves, and is not to be resumed.
    """

    def check() -> None:
        untrained = out.is_dir() and {path.name for path in out.iterdir()} <= {FILE_NAME, BAD_IMAGES}
        if untrained:
            (out / BAD_IMAGES).unlink(missing_ok=True)  # they may have been mended since
        elif not resume and out.exists():
            raise FileExistsError(f"out: {out} exists; go on with --resume, or name another folder")

    on_main_process(accelerator, check)


@contextmanager
def resumable(out: Path, command: str) -> Iterator[None]:
    """Around what a command does once its config lies in `out`.

    Raises:
        KeyboardInterrupt: the user interrupted; the message says how to go on.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or f"interrupted; {_how_to_go_on(out, command)}") from None


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
    return f"go on: fastsds {command} --config {out / FILE_NAME} --resume"
