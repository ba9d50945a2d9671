"""Whose turn it is: requests of several roles wait for places at endpoints, oldest first."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from megacode.synthesize.limits import Limits, Slot
from megacode.synthesize.schema import ServedModel
from megacode.synthesize.totals import Tally


@dataclass
class Endpoint:
    """A model at an address. `refusals`: in a row."""

    url: str
    limits: Limits
    proxy: str | None
    refusals: int = 0
    probe: asyncio.Task[None] | None = None


@dataclass
class Role:
    """A model, where it is, and who waits for it."""

    name: str
    model: ServedModel
    key: str
    endpoints: list[Endpoint]
    waiting: list[tuple[int, int, asyncio.Future[tuple[Endpoint, Slot]]]] = field(
        default_factory=list
    )
    """A heap: the request's number, its tokens, and who waits for a place."""
    tally: Tally = field(default_factory=Tally)

    @property
    def headers(self) -> dict[str, str]:
        kind = {"Content-Type": "application/json"}
        return {**kind, "Authorization": f"Bearer {self.key}"} if self.key else kind


class Turns:
    """Places at the endpoints of roles. `dispatch` is called when what endpoints bear changes."""

    def __init__(self, roles: Iterable[Role]) -> None:
        self._turns = deque(roles)
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Give no more places."""
        if self._timer:
            self._timer.cancel()

    async def place(self, own: Role, number: int, prompt: int) -> tuple[Endpoint, Slot]:
        """Wait for a place of a role; a lower number goes first.

        The caller ends the slot, and dispatches."""
        future: asyncio.Future[tuple[Endpoint, Slot]] = asyncio.get_running_loop().create_future()
        heapq.heappush(own.waiting, (number, prompt, future))
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                endpoint, slot = future.result()
                endpoint.limits.cancelled(slot)
                self.dispatch()
            raise

    def dispatch(self) -> None:
        """Give places to those who wait, to roles in turn; set a timer for who may go later."""
        soonest, idle = math.inf, 0
        while idle < len(self._turns):
            own = self._turns[0]
            self._turns.rotate(-1)
            while own.waiting and own.waiting[0][2].done():
                heapq.heappop(own.waiting)
            wait = math.inf
            if own.waiting:
                _, prompt, future = own.waiting[0]
                waits = [(end.limits.wait(prompt), end) for end in own.endpoints]
                wait = min(seconds for seconds, _ in waits)
            if wait > 0:
                soonest, idle = min(soonest, wait), idle + 1
                continue
            idle = 0
            ready = (end for seconds, end in waits if seconds <= 0)
            end = min(ready, key=lambda end: (end.limits.in_flight, end.limits.started))
            heapq.heappop(own.waiting)
            future.set_result((end, end.limits.start(prompt)))
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if soonest < math.inf:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(soonest, 0.001), self.dispatch)
