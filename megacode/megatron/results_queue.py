"""A helper process that signals to a whole job do not reach, and that ends with the process that needs it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import pickle
import signal
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megacode.launch import without_main
from megacode.signals import STOPPING, blocked

_PR_SET_PDEATHSIG = 1


class ApartQueue:
    """A queue in a process of its own, for forked copies of this one to put results into; what Megatron-Core's checkpoint writers
    use of one.

    Slurm sends a signal to every process of a step, and a terminal to every process of a job; the queue has to outlive
    those that ask this process to save and stop. A copy forked from here keeps this one's handlers and needs no care.

    That process holds bytes only. To hold the results themselves it would import what they are made of, torch among them:
    1.7 seconds of a core, for which the first save waits, and 0.27 GB for every rank.
    """

    def __init__(self) -> None:
        self._manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        # One that comes before a process ignores it would end it.
        with blocked(STOPPING):
            resource_tracker.ensure_running()  # multiprocessing's own process; its start lets signals through again
        with blocked(STOPPING), without_main():
            self._manager.start(_stay_apart)
        self._queue = self._manager.Queue()

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """The oldest item.

        Raises:
            queue.Empty: there is none.
        """
        return pickle.loads(self._queue.get_nowait())


def _stay_apart() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        # Else it would outlive a killed parent, and hold its output open: Slurm waits a minute for that.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
