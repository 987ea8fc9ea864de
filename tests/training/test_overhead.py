"""What the loop costs beside the models: nothing that waits for the device, and little of the step."""

from __future__ import annotations

import runpy
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

distillation = runpy.run_path(str(Path(__file__).with_name("toyworld_runs.py")))["distillation"]
WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers, and sizes, that are read from tensors.

    Tensor methods that read the CPU's memory directly are counted where `count_reads` has wrapped them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in WAITING_OPS or by_mask) and not self.paused:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def count_reads(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                self.counts[name] += not self.paused
                return method(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused = True
        yield
        self.paused = False


@pytest.mark.parametrize("options", [{}, {"strategy": "importance", "draws": 2, "ranking_weight": 1.0}])
def test_the_device_is_waited_for_only_when_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    trainer = distillation(tmp_path, rows=64, workers=1, run={"steps": 9, "log_every": 3}, **options)
    waits = _Waits()
    waits.count_reads(monkeypatch)
    step, advance = trainer._optimizer.step, trainer._epoch
    per_step: list[dict[str, int]] = []

    def optimizer_step(*args: Any, **kwargs: Any) -> Any:
        with waits.pause():  # AdamW's count of steps lies on the CPU for every device
            return step(*args, **kwargs)

    def epoch(*args: Any) -> Iterator[int]:
        for done in advance(*args):
            per_step.append(dict(waits.counts))
            waits.counts.clear()
            yield done

    trainer._optimizer.step = optimizer_step
    trainer._epoch = epoch
    with waits:
        trainer.fit()
    # the first step comes with the start of the epoch, which shuffles; its end is further on
    assert per_step[1:] == [{"tolist": 1} if step % 3 == 0 else {} for step in range(2, 10)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loop_takes_little_of_the_step(tmp_path: Path, one_thread: None) -> None:
    """Data, logging and bookkeeping: what the training process computes outside the models and the optimizer.

    In CPU time of one thread, which other programs do not add to, nor threads that wait for one another; that the
    worker keeps ahead is in the wait for the batch.
    """
    trainer = distillation(
        tmp_path, rows=12 * 16, batch_size=16, workers=1, run={"steps": 12, "tensorboard": True, "progress": True}
    )
    inside = 0.0

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            start = time.thread_time()
            result = function(*args, **kwargs)
            inside += time.thread_time() - start
            return result

        setattr(owner, name, wrapped)

    timed(trainer.module, "forward")
    timed(trainer.accelerator, "backward")
    timed(trainer._optimizer, "step")
    advance = trainer._epoch
    at: list[tuple[float, float]] = []

    def epoch(*args: Any) -> Iterator[int]:
        for done in advance(*args):
            at.append((time.thread_time(), inside))
            yield done

    trainer._epoch = epoch
    trainer.fit()
    steps = [(end - start, models_end - models) for (start, models), (end, models_end) in pairwise(at)]
    assert statistics.median((whole - models) / whole for whole, models in steps) < 0.05
