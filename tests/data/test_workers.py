from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fastsds.data.workers import worker_context

INTERRUPTED_FORK = """
import os, signal, threading
from torch.utils.data import DataLoader
from fastsds.data.workers import worker_options

signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=threading.Event().wait, daemon=True).start()  # the system may give the signal to it
os.register_at_fork(after_in_parent=interrupt, after_in_child=interrupt)
try:
    print(len(list(DataLoader(range(4), **worker_options(1)))))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_in_the_middle_of_a_fork_reaches_the_one_process_and_not_its_worker() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_FORK], capture_output=True, text=True, timeout=120)
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
