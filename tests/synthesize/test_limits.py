"""What an endpoint bears, by a clock that the tests move."""

from __future__ import annotations

import math

import pytest

from megacode.synthesize.limits import Limits, Slot, Waits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events() -> list[str]:
    return []


def start(limits: Limits, count: int, prompt: int = 0) -> list[Slot]:
    return [limits.start(prompt) for _ in range(count)]


def pass_in_a_minute(limits: Limits, clock: Clock, prompt: int, completion: int) -> int:
    """Requests that start in a minute when each is answered at once."""
    end, passed = clock.now + 60, 0
    while (wait := limits.wait(prompt)) + clock.now < end:
        clock.now += wait
        limits.answered(limits.start(prompt), prompt, completion)
        passed += 1
    clock.now = end
    return passed


def test_a_burst_of_429_takes_a_quarter_off_once_and_pauses(clock: Clock) -> None:
    limits = Limits("x", 32, clock=clock)
    first, *burst = start(limits, 32)
    assert limits.wait(0) == math.inf, "32 are in flight"
    limits.limited(first, None)
    assert limits.limit == 24
    for slot in burst:
        limits.limited(slot, None)
    assert limits.limit == 24 and limits.in_flight == 0
    assert limits.wait(0) == 2.0
    clock.now += 2.0
    assert limits.wait(0) == 0
    limits.limited(limits.start(0), 7.5)
    assert limits.limit == 18 and limits.wait(0) == 7.5
    for _ in range(20):
        clock.now += 10
        limits.limited(limits.start(0), 1.0)
    assert limits.limit == 1


def test_a_shorter_pause_does_not_end_a_longer_one(clock: Clock) -> None:
    limits = Limits("x", 8, clock=clock)
    first, second = start(limits, 2)
    limits.limited(first, 30.0)
    limits.limited(second, 1.0)
    assert limits.wait(0) == 30.0


def test_25_answers_allow_one_more_up_to_the_most(clock: Clock) -> None:
    limits = Limits("x", 8, clock=clock)
    limits.limited(limits.start(0), 0.0)
    assert limits.limit == 6
    for expected in (6, 7, 8, 8):
        for _ in range(24 if expected == 6 else 25):
            limits.answered(limits.start(0), 1, 1)
        assert limits.limit == expected
    clock.now += 1
    start(limits, 8)
    assert limits.wait(0) == math.inf


def test_requests_a_minute(clock: Clock) -> None:
    limits = Limits("x", 9, requests_per_minute=120, clock=clock)
    assert pass_in_a_minute(limits, clock, 0, 0) in (120, 121, 122)
    assert pass_in_a_minute(limits, clock, 0, 0) in (119, 120, 121)
    clock.now += 3600
    assert pass_in_a_minute(limits, clock, 0, 0) < 124, "an hour of silence saves nothing up"


def test_tokens_a_minute_by_what_was_used_and_not_by_what_was_guessed(clock: Clock) -> None:
    limits = Limits("x", 9, tokens_per_minute=60_000, completion=1000, clock=clock)
    assert 190 < pass_in_a_minute(limits, clock, 100, 200) < 206
    assert 195 < pass_in_a_minute(limits, clock, 100, 200) < 205
    assert limits.start(100).tokens == 300, "replies have had 200 tokens"


def test_a_request_above_the_rate_of_a_second_goes_and_is_paid_off(clock: Clock) -> None:
    limits = Limits("x", 9, tokens_per_minute=600, completion=0, clock=clock)
    assert limits.wait(100) == 0
    limits.answered(limits.start(100), 100, 0)
    assert limits.wait(100) == pytest.approx(10.0)
    clock.now += limits.wait(100)
    limits.limited(limits.start(100), 0.0)
    clock.now += 0.1
    assert limits.wait(100) == 0, "what 429 refused was not used"


def test_what_is_given_back_late_is_not_lost(clock: Clock) -> None:
    limits = Limits("x", 9, tokens_per_minute=600, completion=0, clock=clock)
    refused = limits.start(100)
    clock.now += 10
    assert limits.wait(100) == 0
    limits.limited(refused, 0.0)
    clock.now += 0.1
    for _ in range(2):
        assert limits.wait(100) == 0
        limits.start(100)
    assert limits.wait(100) > 0


def test_failures_in_a_row_make_it_dead_until_a_probe_is_answered(
    clock: Clock, events: list[str]
) -> None:
    limits = Limits("x", 9, waits=Waits(last_probe=8.0), clock=clock, on_event=events.append)
    for slot in start(limits, 4):
        limits.failed(slot)
    limits.answered(limits.start(0), 1, 1)
    late, *slots = start(limits, 6)
    for slot in slots:
        assert not limits.dead
        limits.failed(slot)
    assert limits.dead and limits.wait(0) == math.inf and limits.in_flight == 1
    limits.failed(late)
    waits = []
    for _ in range(6):
        waits.append(limits.probe_wait)
        clock.now += limits.probe_wait
        limits.probed("HTTP 503: loading")
    assert waits == [1, 2, 4, 8, 8, 8]
    assert limits.outages == 1
    limits.probed(None)
    assert not limits.dead and limits.wait(0) == 0
    assert events == [
        "x: does not answer (HTTP 503: loading); requests wait, and it is tried again after up to 8 s",
        "x: answers again after 31 s",
    ]
    for slot in start(limits, 5):
        limits.failed(slot)
    assert limits.dead and limits.probe_wait == 1.0


def test_a_probe_that_is_answered_at_once_is_no_outage(clock: Clock, events: list[str]) -> None:
    limits = Limits("x", 9, clock=clock, on_event=events.append)
    for slot in start(limits, 5):
        limits.failed(slot)
    limits.probed(None)
    assert (limits.outages, limits.dead, events) == (0, False, [])


@pytest.mark.parametrize("refused", [False, True])
def test_an_answer_to_an_earlier_request_ends_an_outage(clock: Clock, refused: bool) -> None:
    limits = Limits("x", 9, clock=clock)
    earlier, *slots = start(limits, 6)
    for slot in slots:
        limits.failed(slot)
    assert limits.dead
    if refused:
        limits.refused(earlier)
    else:
        limits.answered(earlier, 1, 1)
    assert not limits.dead


def test_a_minute_of_429_is_told_once(clock: Clock, events: list[str]) -> None:
    limits = Limits("x", 9, clock=clock, on_event=events.append)
    for _ in range(100):
        limits.limited(limits.start(0), 2.0, "no credit")
        clock.now += 2
    assert len(events) == 1 and "429" in events[0] and events[0].endswith("no credit")
    limits.answered(limits.start(0), 1, 1)
    limits.limited(limits.start(0), 3600.0, "tomorrow")
    assert len(events) == 2 and "again in 3600 s" in events[1]
