"""What the training commands have in common: the folder of a run, and being stopped in it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from fastsds.commands.configs import FILE_NAME
from fastsds.training.interrupt import TrainingInterrupted
from fastsds.training.processes import on_main_process
from fastsds.training.trainer import Trainer


def open_run(accelerator: Accelerator, out: Path, *, resume: bool) -> None:
    """
    Raises:
        FileExistsError: the run's folder holds something and is not to be resumed.
    """

    def check() -> None:
        if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"out: {out} exists; go on with --resume, or name another folder")

    on_main_process(accelerator, check)


def fit(trainer: Trainer, command: str) -> None:
    """Trains, from the last checkpoint where there is one.

    Raises:
        KeyboardInterrupt: a signal stopped the run; the message says how to go on.
    """
    try:
        trainer.fit(resume=True)
    except TrainingInterrupted as stop:
        config = trainer.config.out / FILE_NAME
        raise KeyboardInterrupt(
            f"stopped after step {stop.step} of {trainer.total_steps}, saved as {stop.checkpoint}; go on: "
            f"fastsds {command} --config {config} --resume"
        ) from None
