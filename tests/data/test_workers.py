from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fastsds.data.workers import worker_context

INTERRUPTED = """
import os, signal, threading
from torch.utils.data import DataLoader
from fastsds.data.workers import read_batches, worker_options

forks = 0

def interrupt(*, always):
    global forks
    forks += 1
    if always or forks == 2:
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait, daemon=True).start()  # the system may give the signal to it
os.register_at_fork(after_in_parent=lambda: interrupt(always=False), after_in_child=lambda: interrupt(always=True))
try:
    print(len(list(read_batches(DataLoader(range(4), **worker_options(2))))))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_workers_start_is_heard_by_the_one_process_and_leaves_no_traceback() -> None:
    """It comes in a fork, where Python loses an exception, with one worker there and the other on its way."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_hears_no_signal_while_it_starts(method: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    target = signal.raise_signal
    worker = worker_context(method).Process(target=target, args=(signal.SIGINT,))  # type: ignore[attr-defined]
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
