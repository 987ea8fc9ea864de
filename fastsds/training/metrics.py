"""What a run writes down: one JSON line per step and the same to TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class PendingMetrics:
    """The losses of steps, left on their device until they are asked for; asking is what waits for it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float]] = []
        self._rows: list[Tensor] = []
        self._names: tuple[str, ...] = ()

    def add(self, step: int, outputs: Sequence[Any], grad_norm: Tensor, lr: float) -> None:
        """Keeps what a step's batches gave, NamedTuples of scalars, by their mean."""
        self._names = (*outputs[0]._fields, "grad_norm")
        batches = [torch.stack([value.detach().float() for value in output]) for output in outputs]
        mean = batches[0] if len(batches) == 1 else torch.stack(batches).mean(dim=0)
        self._rows.append(torch.cat([mean, grad_norm.float().reshape(1)]))
        self._steps.append((step, lr))

    def take(self, accelerator: Accelerator) -> list[tuple[int, dict[str, float]]]:
        """The steps since the last time and their values, each a mean over the processes, which all take together."""
        if not self._rows:
            return []
        table = accelerator.reduce(torch.stack(self._rows), "mean").tolist()
        taken = [
            (step, {**dict(zip(self._names, row, strict=True)), "lr": lr})
            for (step, lr), row in zip(self._steps, table, strict=True)
        ]
        self._steps, self._rows = [], []
        return taken


class MetricsLog:
    """Appends `{"step", "split", …}` lines to `metrics.jsonl` in a folder, and to TensorBoard beside it.

    A resumed run cuts the file back to the step it starts from, so that no step stands twice.

    Args:
        folder: of the run.
        resume_step: the last step to keep; 0 starts anew.
    """

    def __init__(self, folder: Path, resume_step: int = 0, *, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= resume_step]
        staging = self.path.with_suffix(".partial")
        staging.write_text("".join(kept), encoding="utf-8")
        staging.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Records `values` of `split` (`train`, `evaluation`) at `step`."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(path: Path, split: str) -> list[dict[str, float]]:
    """The records of one split of a `metrics.jsonl`, in order."""
    records = [json.loads(line) for line in _lines(path)]
    return [record for record in records if record["split"] == split]


def _lines(path: Path) -> list[str]:
    """Whole lines; a line that a killed process left unfinished does not count."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
