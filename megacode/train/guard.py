"""Signals that ask a run to stop: every rank learns of it after the same step, saves, and leaves."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stopping signal (SIGTERM, SIGINT, SIGUSR1) that this process received.

    `agreed()` is collective: after it, all ranks hold the same answer, so they leave the loop after the same step. The
    exchange is one integer over gloo, whatever the device, so that the device never waits for it.
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._group = torch.distributed.new_group(backend="gloo")
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _STOPPING:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # What was asked for is done: a time limit's warning that comes late must not make a failure of it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.received = number

    def agreed(self) -> int:
        """The largest signal number any rank has received so far; 0 if none has."""
        flag = torch.tensor([self.received], dtype=torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag.numpy()[0])
