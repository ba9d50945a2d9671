"""Results in the order of items, as many at work as the window allows, and nothing left at work."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from megacode.synthesize.ordered import in_order


class Work:
    """Doubles a number; says what is at work and what was begun and cancelled."""

    def __init__(self) -> None:
        self.now = self.most = self.begun = self.cancelled = 0
        self.hold = asyncio.Event()

    async def __call__(self, item: int) -> int:
        self.begun += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if item == -1:
                await self.hold.wait()
            elif item == -2:
                raise ValueError("of the work")
            else:
                await asyncio.sleep(random.random() / 500)
            return 2 * item
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)  # it is awaited until it has put things away
            self.cancelled += 1
            raise
        finally:
            self.now -= 1


def test_results_come_in_the_order_of_items() -> None:
    async def run() -> None:
        work = Work()
        assert [result async for result in in_order(range(300), work, lambda: 16)] == list(
            range(0, 600, 2)
        )
        assert work.most == 16
        assert [result async for result in in_order([], work, lambda: 16)] == []

    asyncio.run(run())


def test_items_are_drawn_when_there_is_room() -> None:
    async def run() -> None:
        drawn = 0

        def items() -> Iterator[int]:
            nonlocal drawn
            while drawn < 100:
                yield drawn
                drawn += 1

        async with aclosing(in_order(items(), Work(), lambda: 8)) as results:
            async for result in results:
                assert drawn <= result // 2 + 8
            assert drawn == 100

    asyncio.run(run())


def test_a_slow_item_holds_nobody_up_before_the_window_is_full() -> None:
    async def run() -> None:
        work = Work()
        async with aclosing(in_order([-1, *range(50)], work, lambda: 20)) as results:
            first = asyncio.ensure_future(anext(results))
            while work.begun < 20 or work.now > 1:
                await asyncio.sleep(0.001)
            assert not first.done() and work.begun == 20
            work.hold.set()
            assert [await first] + [one async for one in results] == [-2, *range(0, 100, 2)]

    asyncio.run(run())


def test_others_go_on_while_results_are_taken() -> None:
    """A run of results does not hold up items that have come after them."""

    async def run() -> None:
        begun: list[int] = []

        async def work(item: int) -> int:
            begun.append(item)
            return item

        async with aclosing(in_order(range(100), work, lambda: 50)) as results:
            async for result in results:
                if result == 30:
                    assert max(begun) > 60
                    break

    asyncio.run(run())


def test_nothing_is_left_at_work_when_the_consumer_stops() -> None:
    async def run() -> None:
        work = Work()
        async with aclosing(in_order([1, -1, -1, -1], work, lambda: 4)) as results:
            async for result in results:
                assert result == 2
                break
        assert (work.now, work.cancelled) == (0, 3)

    asyncio.run(run())


def test_the_first_exception_is_raised_at_once_and_ends_the_others() -> None:
    async def run() -> None:
        work = Work()
        with pytest.raises(ValueError, match="of the work"):
            async for _ in in_order([-1, 1, -2, -1], work, lambda: 4):
                pass
        assert (work.now, work.cancelled) == (0, 3)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_an_exception_of_the_items_ends_the_work() -> None:
    async def run() -> None:
        def items() -> Iterator[int]:
            yield from (1, -1, -1)
            raise KeyError("of the items")

        work = Work()
        with pytest.raises(KeyError, match="of the items"):
            async for _ in in_order(items(), work, lambda: 3):
                pass
        assert (work.now, work.cancelled) == (0, 2)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_cancelling_the_consumer_ends_the_work() -> None:
    async def run() -> None:
        work = Work()

        async def consume() -> None:
            async for _ in in_order([-1, -1], work, lambda: 4):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (work.now, work.cancelled) == (0, 2)

    asyncio.run(run())
