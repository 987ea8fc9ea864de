from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsds.training import Trainer, TrainingInterrupted
from fastsds.training.metrics import read_metrics


def _raise_at(call: int, number: signal.Signals, times: int = 1) -> Callable[[int], None]:
    def hook(current: int) -> None:
        if current == call:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [{}, {"save_every": 4}, {"accumulation": 2, "steps": 9}])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    toy: Any, loader: Any, config: Any, tmp_path: Any, capfd: Any, number: signal.Signals, options: dict[str, int]
) -> None:
    options = {"steps": 12, **options}
    calls = 4 * options.get("accumulation", 1)
    whole, stopped, resumed = toy(dropout=0.5), toy(dropout=0.5, on_forward=_raise_at(calls, number)), toy(dropout=0.5)
    torch.manual_seed(3)
    Trainer(whole, loader(), config(**options, out=tmp_path / "whole")).fit()

    torch.manual_seed(3)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted) as caught:
        Trainer(stopped, loader(), config(**options)).fit()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = config().out / "checkpoints" / "step-00000004"
    assert str(caught.value) == (
        f"stopped at step 4 of {options['steps']}, saved as {saved}; resume with fit(resume=True), or on the command "
        f"line with --resume and the same options"
    )
    assert (caught.value.step, caught.value.checkpoint, caught.value.EXIT_STATUS) == (4, saved, 130)
    assert max(path.name for path in saved.parent.iterdir()) == saved.name
    assert len(stopped.seen) == calls
    assert [record["step"] for record in read_metrics(config().out / "metrics.jsonl", "train")] == [1, 2, 3, 4]
    assert capfd.readouterr().err == "\nstopping after this step and a checkpoint; once more to stop at once\n"

    Trainer(resumed, loader(), config(**options)).fit(resume=True)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_an_interruption_is_no_error_that_programs_catch() -> None:
    assert issubclass(TrainingInterrupted, KeyboardInterrupt) and not issubclass(TrainingInterrupted, Exception)


def test_a_second_signal_ends_the_run_at_once(toy: Any, loader: Any, config: Any) -> None:
    module = toy(on_forward=_raise_at(4, signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt) as caught:
        Trainer(module, loader(), config(steps=12)).fit()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (config().out / "checkpoints").exists()


def test_a_signal_in_the_last_step_changes_nothing(toy: Any, loader: Any, config: Any) -> None:
    result = Trainer(toy(on_forward=_raise_at(5, signal.SIGINT)), loader(), config(steps=5)).fit()
    assert result.step == 5 and result.checkpoint.name == "step-00000005"


def test_a_run_in_another_thread_leaves_signals_alone(toy: Any, loader: Any, config: Any) -> None:
    results: list[Any] = []
    trainer = Trainer(toy(), loader(), config(steps=3))
    thread = threading.Thread(target=lambda: results.append(trainer.fit()))
    thread.start()
    thread.join()
    assert results[0].step == 3


class _InterruptedRows(Dataset[dict[str, Tensor]]):
    """Rows whose reader hears Ctrl-C at each of them, as a worker does that a terminal signals with its parent."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        return self.rows[index]


def test_workers_do_not_hear_ctrl_c(toy: Any, loader: Any, config: Any, tmp_path: Any) -> None:
    def started(index: int) -> None:
        (tmp_path / f"worker-{index}").touch()

    options = {"num_workers": 1, "worker_init_fn": started, "multiprocessing_context": "fork"}
    data = DataLoader(_InterruptedRows(loader().dataset), 2, persistent_workers=True, **options)
    assert Trainer(toy(), data, config(steps=8)).fit().step == 8
    assert (tmp_path / "worker-0").exists()  # the loader's own start is kept
