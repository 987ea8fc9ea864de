"""Worker processes of data loaders, which leave Ctrl-C to the process that they work for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext, ForkProcess, ForkServerProcess, SpawnProcess
from typing import Any

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def worker_options(workers: int) -> dict[str, Any]:
    """Options of a `DataLoader` with so many workers; 0 reads in this process."""
    if workers == 0:
        return {"num_workers": 0}
    return {"num_workers": workers, "worker_init_fn": leave_signals, "multiprocessing_context": worker_context()}


def worker_context(method: str | None = None) -> BaseContext:
    """The context of a start method, by default the one in force, whose processes hear no signal while they start.

    They are to call `leave_signals` then.
    """
    method = method or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    context = type(multiprocessing.get_context(method))()
    context.Process = _WORKERS[method]  # type: ignore[attr-defined]
    return context


def read_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, read where Ctrl-C is an exception: not one while workers start, which would leave them
    half made."""
    with _signals_held():
        batches = iter(loader)
    yield from batches


def leave_signals(worker: int) -> None:
    """Makes a worker leave Ctrl-C to the training process, which may need it to end its step, and go when told to.

    It would inherit a handler that takes SIGTERM for a request to the run, could not be ended, and Python would wait
    for it at its exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds signals back in this process, and in those that it starts for good; what came is raised at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    # A mask holds for one thread, and another may take the signal: Python's handlers, too, have to wait.
    handled = threading.current_thread() is threading.main_thread() and None not in handlers.values()
    late: list[int] = []
    try:
        if handled:
            for number in _SIGNALS:
                signal.signal(number, lambda number, frame: late.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handled:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for missed in late:
            signal.raise_signal(missed)


class _HeldBack:
    """Starts with signals held back: a new process would answer Ctrl-C with a traceback."""

    _start_method: str

    def start(self) -> None:
        if self._start_method != "fork":
            resource_tracker.ensure_running()  # it lets signals through when it is started
        with _signals_held():
            if self._start_method != "fork":  # it can be ended while it still imports: it inherits no handler
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            super().start()  # type: ignore[misc]


class _ForkWorker(_HeldBack, ForkProcess):
    pass


class _SpawnWorker(_HeldBack, SpawnProcess):
    pass


class _ForkServerWorker(_HeldBack, ForkServerProcess):
    pass


_WORKERS = {"fork": _ForkWorker, "spawn": _SpawnWorker, "forkserver": _ForkServerWorker}
