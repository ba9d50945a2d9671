"""The signals that ask a job to save and stop, and how they wait while a process cannot heed them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def held_back(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals wait meanwhile, for this thread and for what it starts: threads, processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def let_through(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals that an outer `held_back` holds come meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget(numbers: Iterable[signal.Signals]) -> None:
    """Those that wait ask for nothing any more."""
    for number in signal.sigpending() & set(numbers):
        signal.sigwait({number})
