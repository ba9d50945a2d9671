"""Signals that ask a job to save and stop."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def blocked(numbers: Iterable[signal.Signals]) -> AbstractContextManager[None]:
    """Block signals inside the context: in this thread and in threads and processes it starts."""
    return _masked(signal.SIG_BLOCK, numbers)


def unblocked(numbers: Iterable[signal.Signals]) -> AbstractContextManager[None]:
    """Deliver signals that an outer `blocked` holds, inside the context."""
    return _masked(signal.SIG_UNBLOCK, numbers)


def discard_pending(numbers: Iterable[signal.Signals]) -> None:
    """Discard pending signals."""
    for number in signal.sigpending() & set(numbers):
        signal.sigwait({number})


@contextmanager
def _masked(how: int, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(how, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
