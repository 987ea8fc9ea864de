"""Two processes give the numbers of one, end when one of them dies, and agree on where to stop."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from fastsds.training.checkpoint import latest_checkpoint
from fastsds.training.metrics import read_metrics
from fastsds.training.processes import share_loader

SCRIPT = Path(__file__).with_name("toyworld_runs.py")
ALIKE = ["distillation", "importance", "stratified", "intcoop"]


def _launch(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *options, str(SCRIPT), str(folder), *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in this process, on as many threads as each process of a launch has: sums round by their number."""
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        try:
            outcome = runpy.run_path(str(SCRIPT))["main"](folder, [*ALIKE, "saving"])
        finally:
            torch.set_num_threads(threads)
    assert set(outcome.values()) <= {"step 4", "step 6", "step 7"}
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run, one of whose two processes is killed in its sixth step, and what it left behind."""
    folder = tmp_path_factory.mktemp("two")
    launched = _launch(folder, "killed")
    left = {path.name: path.stat().st_mtime for path in (folder / "killed" / "checkpoints").iterdir()}
    return SimpleNamespace(folder=folder, launched=launched, left=left, seconds=time.time() - max(left.values()))


@pytest.fixture(scope="module")
def two(killed: Any) -> tuple[Path, list[dict[str, str]]]:
    """The same runs in two processes, and what each process came to."""
    folder = killed.folder
    names = [*ALIKE, "resumed killed", "stopped", "resumed stopped", "odd", "intcoop"]
    launched = _launch(folder, *names)
    assert launched.returncode == 0, launched.stderr
    return folder, [json.loads((folder / f"outcome-{rank}.json").read_text("utf-8")) for rank in range(2)]


def _require_same(run: Path, expected: Path) -> None:
    metrics, expected_metrics = (read_metrics(folder / "metrics.jsonl", "train") for folder in (run, expected))
    assert len(metrics) == len(expected_metrics)
    for record, expected_record in zip(metrics, expected_metrics, strict=True):
        assert record.pop("split") == expected_record.pop("split")
        assert record == pytest.approx(expected_record, rel=1e-5, abs=1e-7)
    last, expected_last = (latest_checkpoint(folder / "checkpoints") for folder in (run, expected))
    assert last is not None and expected_last is not None and last.name == expected_last.name
    # Adam's averages are the gradients, which the tensors that it makes of them would hide.
    for file in ("trained.safetensors", "optimizer.safetensors"):
        tensors, expected_tensors = load_file(last / file), load_file(expected_last / file)
        assert tensors.keys() == expected_tensors.keys()
        for name, tensor in expected_tensors.items():
            scale = tensor.abs().max().item()
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("run", ALIKE)
def test_two_processes_give_the_numbers_of_one(one: Path, two: tuple[Path, Any], run: str) -> None:
    _require_same(two[0] / run, one / run)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_within_a_minute(killed: Any) -> None:
    assert killed.launched.returncode != 0 and "SIGKILL" in killed.launched.stderr
    assert set(killed.left) == {"step-00000002", "step-00000004"}
    assert killed.seconds < 60


@pytest.mark.slow
def test_a_killed_run_is_resumed_in_two_processes(one: Path, two: tuple[Path, list[dict[str, str]]]) -> None:
    folder, outcomes = two
    assert [outcome["resumed killed"] for outcome in outcomes] == ["step 7"] * 2
    _require_same(folder / "killed", one / "saving")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    one: Path, two: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, outcomes = two
    saved = folder / "stopped" / "checkpoints" / "step-00000003"
    for outcome in outcomes:
        assert outcome["stopped"].startswith(f"TrainingInterrupted: stopped at step 3 of 4, saved as {saved}; resume")
        assert outcome["resumed stopped"] == "step 4"
    _require_same(folder / "stopped", one / "distillation")


@pytest.mark.slow
def test_every_process_raises_what_is_wrong_and_the_main_one_alone_writes(
    two: tuple[Path, list[dict[str, str]]],
) -> None:
    folder, outcomes = two
    for outcome in outcomes:
        assert outcome["odd"] == (
            "ValueError: loader: the last batch of an epoch has 3 rows, which do not split over 2 processes; make the "
            "loader with drop_last=True, or take another batch size"
        )
        assert outcome["intcoop"].startswith(f"FileExistsError: out: {folder / 'intcoop'} exists and is not empty")
    assert {path.name for path in (folder / "intcoop").iterdir()} == {"checkpoints", "metrics.jsonl"}


def _process(index: int, processes: int) -> Any:
    return SimpleNamespace(num_processes=processes, process_index=index, device=torch.device("cpu"))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_is_split_in_consecutive_parts(loader: Any, processes: int, shuffle: bool) -> None:
    def epochs(index: int, of: int) -> list[list[list[int]]]:
        shared = share_loader(loader(rows=20, batch_size=8, shuffle=shuffle), _process(index, of), seed=3)
        seen = []
        for epoch in (0, 1, 0):
            shared.set_epoch(epoch)
            seen.append([batch["index"].tolist() for batch in shared])
        return seen

    whole, parts = epochs(0, 1), [epochs(index, processes) for index in range(processes)]
    joined = [[list(chain(*pieces)) for pieces in zip(*epoch, strict=True)] for epoch in zip(*parts, strict=True)]
    assert joined == whole
    assert all(sorted(chain(*epoch)) == list(range(20)) for epoch in whole)
    assert whole[0] == whole[2] and (whole[0] != whole[1]) == shuffle
    assert {len({len(piece) for piece in pieces}) for pieces in zip(*(part[0] for part in parts), strict=True)} == {1}


class _Epochs:
    epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _OwnBatches(_Epochs, BatchSampler):
    pass


class _OwnRows(_Epochs, list[int]):
    pass


@pytest.mark.parametrize("own_batches", [True, False])
def test_samplers_and_data_hear_of_the_epoch(own_batches: bool) -> None:
    rows = _OwnRows(range(4))
    batches = _OwnBatches(SequentialSampler(rows), 2, False)
    options: dict[str, Any] = {"batch_sampler": batches} if own_batches else {"batch_size": 2, "shuffle": True}
    shared = share_loader(DataLoader(rows, **options), _process(1, 2), seed=0)
    shared.set_epoch(5)
    assert rows.epoch == 5 and batches.epoch == (5 if own_batches else None)
    if own_batches:
        assert [batch.tolist() for batch in shared] == [[1], [3]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 3}, ValueError, "batch_size: expected a multiple of 2, the number of processes, got 3"),
        ({"rows": 11, "batch_size": 4}, ValueError, "loader: the last batch of an epoch has 3 rows, which do not spl"),
        ({"batch_size": None, "shuffle": False}, TypeError, "loader: expected rows by position and a batch size under"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(loader: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        share_loader(loader(**options), _process(0, 2), seed=0)
    assert len(share_loader(loader(**options), _process(0, 1), seed=0)) > 0
    assert len(share_loader(loader(rows=11, batch_size=4, drop_last=True), _process(0, 2), seed=0)) == 2


def test_a_stream_is_for_one_process() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(range(6))

        def __len__(self) -> int:
            return 6

    shared = share_loader(DataLoader(Stream(), batch_size=2), _process(0, 1), seed=0)
    assert [batch.tolist() for batch in shared] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(TypeError, match=r"loader: expected rows by position .* under several processes, got a stream"):
        share_loader(DataLoader(Stream(), batch_size=2), _process(0, 2), seed=0)


def test_processes_that_were_not_joined_are_refused(
    toy: Any, loader: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import PartialState

    from fastsds.training import Trainer

    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="processes: the launcher started 2 and this one joined 1; make no Acceler"):
        Trainer(toy(), loader(), config())
