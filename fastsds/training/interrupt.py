"""Ctrl-C: the run ends after a step, in all processes after the same one, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A run was stopped by a signal and has saved itself; the message says where, and how to go on.

    A program that stops for it exits with status `EXIT_STATUS`, as shells have it for Ctrl-C.
    """

    EXIT_STATUS = 130

    def __init__(self, step: int, total_steps: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped at step {step} of {total_steps}, saved as {checkpoint}; resume with fit(resume=True), or on the "
            f"command line with --resume and the same options"
        )
        self.step = step
        self.checkpoint = checkpoint


class StopRequest:
    """Takes the first SIGINT or SIGTERM as a request, while it is entered; the second stops the process at once.

    Signals reach Python's main thread only; a run in another thread is not asked.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}
        # Votes travel on the CPU, so that no device is waited for.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._vote: tuple[Any, torch.Tensor] | None = None

    def agreed(self) -> bool:
        """Whether to stop now; every process asks after every step, and all get the same answer.

        With several processes it is about the requests of the step before: their votes have arrived by now.
        """
        if self._group is None:
            return self._requested
        vote = torch.tensor(int(self._requested))
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._vote = self._vote, (work, vote)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        if not (dist.is_initialized() and dist.get_rank()):
            # Unbuffered: the signal may have come in the middle of another write.
            os.write(2, b"\nstopping after this step and a checkpoint; once more to stop at once\n")
