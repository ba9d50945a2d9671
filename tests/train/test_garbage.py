"""Python's cyclic garbage goes when the loop says, on every rank after the same step."""

from __future__ import annotations

import gc
import weakref

from megacode.train import garbage


class Node:
    """One that refers to itself: no count of references frees it."""

    def __init__(self) -> None:
        self.self = self


def _dropped() -> weakref.ref[Node]:
    return weakref.ref(Node())


def test_cycles_stay_until_the_loop_says() -> None:
    with garbage.held_off():
        gone = _dropped()
        many = [[] for _ in range(200_000)]  # enough new objects for a collection of its own
        for _ in range(3):
            many.append([list(item) for item in many[:200_000]])
        garbage.collect_after(garbage.EVERY - 1)
        assert gone() is not None
        garbage.collect_after(garbage.EVERY)
        assert gone() is None


def test_afterwards_python_collects_as_before() -> None:
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            with garbage.held_off():
                assert not gc.isenabled()
                assert gc.get_freeze_count() > 0
            assert gc.isenabled() is was_on
            assert gc.get_freeze_count() == 0
        finally:
            gc.enable()
