"""A helper process that signals to a whole job do not reach, and that ends with the process that needs it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from multiprocessing.managers import SyncManager
from multiprocessing.queues import Queue
from typing import Any

_PR_SET_PDEATHSIG = 1


def shared_queue() -> Queue[Any]:
    """A queue in a process of its own, for forked copies of this one to put results into.

    Slurm sends a signal to every process of a step, and a terminal to every process of a job; the queue has to outlive
    those that ask this process to save and stop. A copy forked from here keeps this one's handlers and needs no care.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_stay_apart)
    return manager.Queue()  # type: ignore[return-value]  # a proxy of one; it keeps the manager


def _stay_apart() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        # Else it would outlive a killed parent, and hold its output open: Slurm waits a minute for that.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
