"""Laws of preparing ahead: same items, same order, errors in their place, no thread left behind."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from megacode.data.prefetch import Prefetch


def threads() -> int:
    return sum(thread.name.startswith("megacode-prefetch") for thread in threading.enumerate())


def wait_for_none() -> bool:
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return threads() == 0


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_items_come_in_order(depth: int) -> None:
    assert list(Prefetch((i * i for i in range(20)), depth)) == [i * i for i in range(20)]
    assert wait_for_none()


@pytest.mark.parametrize("depth", [0, 3])
def test_an_error_comes_where_its_item_would(depth: int) -> None:
    def make(i: int) -> int:
        if i == 2:
            raise OSError("the disk")
        return i

    items = Prefetch(map(make, range(9)), depth)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk"):
        next(items)
    with pytest.raises(StopIteration):
        for _ in range(9):
            next(items)


def test_it_prepares_no_more_than_asked() -> None:
    made: list[int] = []
    with Prefetch(map(made.append, range(100)), 3) as items:
        next(items)
        time.sleep(0.1)
        assert len(made) <= 1 + 3 + 1  # handed out, waiting, in the thread's hands
    assert threads() == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_nothing_comes_after_close(depth: int) -> None:
    items = Prefetch(range(100), depth)
    next(items)
    items.close()
    items.close()
    assert list(items) == []
    assert threads() == 0


def test_a_lost_reference_ends_the_thread() -> None:
    items = Prefetch(range(10**9), 2)
    next(items)
    assert threads() == 1
    del items
    gc.collect()
    assert wait_for_none()
