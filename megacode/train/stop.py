"""Signals that ask a run to stop: all ranks stop after the same step, and save."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megacode.signals import STOPPING

_ONE_PRESS = 1.0
"""Seconds in which several SIGINTs are one Ctrl-C: the terminal sends it to every process, and the
launcher sends it again."""


class StopRequest:
    """Remembers the first stopping signal (SIGTERM, SIGINT, SIGUSR1) that this process received.

    `should_stop()` is collective: all ranks get the same answer, so they leave the loop after the
    same step. The exchange is one integer over gloo, whatever the device, so the device never waits
    for it. It runs during the next step, so no rank waits either.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._group = torch.distributed.new_group(backend="gloo")
        self._alone = torch.distributed.get_world_size() == 1
        self._exchange: tuple[Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOPPING:
            self._previous[number] = signal.signal(number, self._remember)
        # One may have come while the run started.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The run is saved: a time limit's warning that comes late must not end it as a failure.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if kind is None:  # after an error other ranks may not come here
            self._finish()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self._when = now
        elif number == signal.SIGINT and now - self._when > _ONE_PRESS:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.received = number

    def should_stop(self) -> int:
        """The largest signal number that any rank had received at the call before; 0 if none had.

        In a process alone: had received by now.
        """
        if self._alone:
            return self.received
        answer = self._finish()
        flag = torch.tensor([self.received], dtype=torch.int32)
        work = torch.distributed.all_reduce(
            flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._exchange = flag, work
        return answer

    def _finish(self) -> int:
        if self._exchange is None:
            return 0
        (flag, work), self._exchange = self._exchange, None
        work.wait()
        return int(flag.numpy()[0])
