from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fastsds.data.workers import worker_context

INTERRUPTED = """
import multiprocessing.process, os, signal, sys, threading
from torch.utils.data import DataLoader
from fastsds.data.workers import read_batches, worker_options

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def join(self, timeout=None, join=multiprocessing.process.BaseProcess.join):
    interrupt()
    return join(self, timeout)

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait, daemon=True).start()  # the system may give the signal to it
if sys.argv[1] == "start":
    os.register_at_fork(after_in_parent=interrupt, after_in_child=interrupt)
else:
    multiprocessing.process.BaseProcess.join = join
count = 0
try:
    for batch in read_batches(DataLoader(range(4), **worker_options(2))):
        count += 1
except KeyboardInterrupt:
    print("interrupted after", count)
"""


@pytest.mark.parametrize(("when", "said"), [("start", "interrupted after 0\n"), ("end", "interrupted after 4\n")])
def test_ctrl_c_is_heard_where_workers_start_and_end_and_leaves_no_traceback(when: str, said: str) -> None:
    """Python loses what comes in the middle of a fork or in a destructor; workers would answer with a traceback."""
    words = [sys.executable, "-c", INTERRUPTED, when]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == (said, "", 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_hears_no_signal_while_it_starts(method: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    target = signal.raise_signal
    worker = worker_context(method).Process(target=target, args=(signal.SIGINT,))  # type: ignore[attr-defined]
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
