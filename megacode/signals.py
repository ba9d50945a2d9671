"""The signals that ask a job to save and stop, and how they wait while a process cannot heed them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def held_back(numbers: Iterable[signal.Signals]) -> AbstractContextManager[None]:
    """Signals wait meanwhile, for this thread and for what it starts: threads, processes."""
    return _masked(signal.SIG_BLOCK, numbers)


def let_through(numbers: Iterable[signal.Signals]) -> AbstractContextManager[None]:
    """Signals that an outer `held_back` holds come meanwhile."""
    return _masked(signal.SIG_UNBLOCK, numbers)


@contextmanager
def _masked(how: int, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(how, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget(numbers: Iterable[signal.Signals]) -> None:
    """Those that wait ask for nothing any more."""
    for number in signal.sigpending() & set(numbers):
        signal.sigwait({number})
