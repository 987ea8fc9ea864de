from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastsds.training.metrics import MetricsLog, PendingMetrics, read_metrics


class _Losses(NamedTuple):
    loss: Tensor
    part: Tensor


def test_pending_steps_are_means_over_batches_and_processes_taken_once() -> None:
    pending, calls = PendingMetrics(), []

    def reduce(table: Tensor, how: str) -> Tensor:
        calls.append((list(table.shape), how))
        return table + 1  # what the other processes add to the mean

    accelerator: Any = SimpleNamespace(reduce=reduce)
    assert pending.take(accelerator) == []
    halves = [_Losses(torch.tensor(loss), torch.tensor(part)) for loss, part in ((1.0, 4.0), (2.0, 8.0))]
    pending.add(6, halves, torch.tensor(0.25), 0.5)
    pending.add(7, halves[:1], torch.tensor(0.75, dtype=torch.float64), 0.125)
    assert pending.take(accelerator) == [
        (6, {"loss": 2.5, "part": 7.0, "grad_norm": 1.25, "lr": 0.5}),
        (7, {"loss": 2.0, "part": 5.0, "grad_norm": 1.75, "lr": 0.125}),
    ]
    assert calls == [([2, 3], "mean")]
    assert pending.take(accelerator) == []


def _write(folder: Path, steps: range, resume_step: int = 0) -> None:
    with MetricsLog(folder, resume_step, tensorboard=False) as log:
        for step in steps:
            log.write(step, "train", {"loss": step / 8})
            if step % 2 == 0:
                log.write(step, "evaluation", {"accuracy": 0.5})


def test_a_line_is_the_step_its_split_and_its_values(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 3))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "split": "train", "loss": 0.125},
        {"step": 2, "split": "train", "loss": 0.25},
        {"step": 2, "split": "evaluation", "accuracy": 0.5},
    ]


def test_splits_are_read_apart(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(path, "train")] == [1, 2, 3, 4]
    assert [record["step"] for record in read_metrics(path, "evaluation")] == [2, 4]
    assert read_metrics(path, "absent") == read_metrics(tmp_path / "absent.jsonl", "train") == []


@pytest.mark.parametrize(("resume_step", "kept"), [(0, []), (2, [1, 2]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_a_resumed_log_is_cut_back_to_its_step(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    _write(tmp_path, range(1, 5))
    _write(tmp_path, range(resume_step + 1, resume_step + 3), resume_step)
    records = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [record["step"] for record in records] == [*kept, resume_step + 1, resume_step + 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_unfinished_last_line_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "split": "train", "lo')
    assert [record["step"] for record in read_metrics(path, "train")] == [1, 2, 3]
    _write(tmp_path, range(4, 5), resume_step=4)
    assert [record["step"] for record in read_metrics(path, "train")] == [1, 2, 3, 4]


def test_flushed_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, "train", {"loss": 1.0})
        log.flush()
        assert len(read_metrics(tmp_path / "metrics.jsonl", "train")) == 1


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, "train", {"loss": 0.1 + 0.2, "tiny": 5e-324})
    (record,) = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert (record["loss"], record["tiny"]) == (0.1 + 0.2, 5e-324)


def test_a_resumed_tensorboard_shows_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, value in ((0, 1.0), (2, 7.0)):
        with MetricsLog(tmp_path, resume_step) as log:
            for step in range(resume_step + 1, 5):
                log.write(step, "train", {"loss": value})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 7), (4, 7)]


def test_without_tensorboard_there_is_no_folder_of_it(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 3))
    assert not (tmp_path / "tensorboard").exists()
