"""What one endpoint bears: requests in flight, rates, pauses, and whether it is alive.

There is no input or output here, and time comes from a clock that a test can move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

_FAILURES = 5
"""In a row, after which an endpoint is held to be dead."""
_SUCCESSES = 25
"""For one more request in flight."""
_LEAST_COOLDOWN = 0.1
_ONLY_LIMITED = 60.0
"""Seconds of nothing but 429, after which the user is told."""


@dataclass(frozen=True)
class Waits:
    """Seconds."""

    cooldown: float = 2.0
    """After a 429 that does not say how long."""
    first_probe: float = 1.0
    last_probe: float = 60.0
    first_retry: float = 0.5
    last_retry: float = 30.0


USUAL = Waits()


class Bucket:
    """A rate a minute. What may be spent grows with time, up to the worth of one second.

    A cost above that may be spent when the bucket is full, and is paid off before the next."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._rate = per_minute / 60
        self._most = self._level = max(1.0, self._rate)
        self._time = now

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` may be spent."""
        if self._level < self._most:
            self._level = min(self._most, self._level + (now - self._time) * self._rate)
        self._time = now
        missing = min(cost, self._most) - self._level
        return missing / self._rate if missing > 1e-6 else 0.0

    def spend(self, cost: float) -> None:
        """Less than 0 gives back."""
        self._level -= cost


@dataclass(frozen=True)
class Slot:
    """A request's place at an endpoint.

    Attributes:
        burst: how often the limit had been lowered when the request started.
        tokens: taken from the rate of tokens.
    """

    burst: int
    tokens: int


class Limits:
    """Of one endpoint.

    A request asks `wait`, calls `start` when that is 0, and ends with one of `answered`, `limited`,
    `refused`, `failed` and `cancelled`. While `dead`, nothing starts: a probe is due every
    `probe_wait` seconds, and `probed` takes what came of it.

    Args:
        name: for events.
        in_flight: the most at a time. The first 429 of a burst takes a quarter off; 25 answers add
            one.
        completion: tokens of a reply, as long as there is none to tell.
        on_event: gets a line when the endpoint is dead, when it is back, and when it answers
            nothing but 429.

    Attributes:
        outages: how often the endpoint was dead and did not answer a probe at once.
    """

    def __init__(
        self,
        name: str,
        in_flight: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        completion: int = 500,
        waits: Waits = USUAL,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[str], None] = print,
    ) -> None:
        self.name, self.most, self.limit = name, in_flight, in_flight
        self.in_flight = self.started = self.outages = 0
        self.dead = False
        self._waits, self._clock, self._on_event = waits, clock, on_event
        now = clock()
        self._requests = Bucket(requests_per_minute, now) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, now) if tokens_per_minute else None
        self._completion, self._completions = float(completion), 0
        self._burst = self._successes = self._failures = 0
        self._cool_until = -math.inf
        self._limited_since = math.inf
        self._died = now
        self._told_dead = self._told_limited = False
        self.probe_wait = waits.first_probe

    def wait(self, prompt: int) -> float:
        """Seconds until a request may start; infinite if something has to end first."""
        if self.dead or self.in_flight >= self.limit:
            return math.inf
        now = self._clock()
        seconds = self._cool_until - now
        if self._requests:
            seconds = max(seconds, self._requests.wait(1, now))
        if self._tokens:
            seconds = max(seconds, self._tokens.wait(prompt + self._completion, now))
        return max(0.0, seconds)

    def start(self, prompt: int) -> Slot:
        """Take a place for a request of about that many tokens."""
        slot = Slot(self._burst, prompt + round(self._completion))
        self.in_flight += 1
        self.started += 1
        if self._requests:
            self._requests.spend(1)
        if self._tokens:
            self._tokens.spend(slot.tokens)
        return slot

    def answered(self, slot: Slot, prompt: int, completion: int) -> None:
        """A reply of that usage has come."""
        self._end(slot, prompt + completion)
        # The mean of the first hundred replies, then one that follows the last hundred.
        self._completions = min(self._completions + 1, 100)
        self._completion += (completion - self._completion) / self._completions
        self._successes += 1
        if self._successes >= _SUCCESSES and self.limit < self.most:
            self.limit, self._successes = self.limit + 1, 0
        self._limited_since, self._told_limited = math.inf, False
        self._is_alive()

    def limited(self, slot: Slot, seconds: float | None, message: str = "") -> None:
        """A 429; `seconds`: what it asks to wait."""
        self._end(slot, 0)
        now = self._clock()
        if slot.burst == self._burst:
            self.limit = max(1, int(self.limit * 0.75))
            self._burst, self._successes = self._burst + 1, 0
        cooldown = self._waits.cooldown if seconds is None else max(_LEAST_COOLDOWN, seconds)
        self._cool_until = max(self._cool_until, now + cooldown)
        self._limited_since = min(self._limited_since, now)
        refused_for = self._cool_until - self._limited_since
        if refused_for > _ONLY_LIMITED and not self._told_limited:
            self._told_limited = True
            self._on_event(
                f"{self.name}: answers 429 only, since {now - self._limited_since:.0f} s; it is "
                f"asked again in {self._cool_until - now:.0f} s and says: {message}"
            )

    def refused(self, slot: Slot) -> None:
        """The endpoint lives, and does not want this request."""
        self._end(slot, 0)
        self._is_alive()

    def failed(self, slot: Slot) -> None:
        """No answer that can be read; its tokens may have been made all the same."""
        self._end(slot, slot.tokens)
        self._failures += 1
        if self._failures >= _FAILURES and not self.dead:
            self.dead, self._died = True, self._clock()
            self.probe_wait = self._waits.first_probe

    def cancelled(self, slot: Slot) -> None:
        """Nobody waits for the answer any more."""
        self._end(slot, slot.tokens)

    def probed(self, failure: str | None) -> None:
        """What came of a probe: None if it was answered."""
        if failure is None:
            self._is_alive()
        elif self.dead:
            if not self._told_dead:
                self._told_dead = True
                self.outages += 1
                self._on_event(
                    f"{self.name}: does not answer ({failure}); requests wait, and it is tried "
                    f"again after up to {self._waits.last_probe:.0f} s"
                )
            self.probe_wait = min(self.probe_wait * 2, self._waits.last_probe)

    def _is_alive(self) -> None:
        self._failures = 0
        self.dead = False
        if self._told_dead:
            self._told_dead = False
            seconds = self._clock() - self._died
            self._on_event(f"{self.name}: answers again after {seconds:.0f} s")

    def _end(self, slot: Slot, tokens: int) -> None:
        self.in_flight -= 1
        if self._tokens:
            self._tokens.spend(tokens - slot.tokens)
