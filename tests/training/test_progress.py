from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from fastsds.training import Trainer
from fastsds.training.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _go(progress: Progress, clock: list[float]) -> None:
    with progress:
        for step in range(5, 9):
            clock[0] += 25.0
            progress.advance()
            progress.tell(step, step / 8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("fastsds.training.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    _go(Progress("run", 4, 10, shown=True), clock)
    assert capsys.readouterr().err.splitlines() == [
        "run: 5/10 [00:25<02:05, 25.00s/step, loss=0.6250]",
        "run: 8/10 [01:40<00:50, 25.00s/step, loss=1.0000]",
    ]


def test_a_terminal_gets_a_bar(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    _go(Progress("run", 4, 10, shown=True), clock)
    assert "\r" in terminal.getvalue() and "8/10" in terminal.getvalue().rsplit("\r", 1)[1]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_where_it_is_not_wanted(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal() if terminal else io.StringIO())
    _go(Progress("run", 4, 10, shown=False), clock)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_run_tells_how_far_it_has_come(
    toy: Any, loader: Any, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(toy(), loader(), config(steps=3, log_every=2, progress=True)).fit()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run: 2/3 [") and "loss=" in line
