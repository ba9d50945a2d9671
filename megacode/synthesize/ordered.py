"""Work on many items at a time, with results in the order of the items."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


async def in_order(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], window: Callable[[], int]
) -> AsyncGenerator[Result, None]:
    """`await work(item)` of each item, in order, with many at work.

    The first exception of any item is raised when it occurs, not in its turn. Then, and when the
    generator is closed, all that is in flight is cancelled and awaited. A `for` that is left early
    does not close it at once; `contextlib.aclosing` does.

    Args:
        items: drawn as there is room.
        window: how many items may now be at work or done but not yet taken, at least 1. A slow item
            holds the others up when so many are behind it: several times what can be in flight
            keeps all busy.
    """
    failed: asyncio.Future[asyncio.Task[Result]] = asyncio.get_running_loop().create_future()
    tasks: deque[asyncio.Task[Result]] = deque()

    async def one(item: Item) -> Result:
        return await work(item)

    def look(task: asyncio.Task[Result]) -> None:
        if not task.cancelled() and task.exception() is not None and not failed.done():
            failed.set_result(task)

    source = iter(items)
    try:
        while True:
            while len(tasks) < window():
                item = next(source, _END)
                if item is _END:
                    break
                task = asyncio.create_task(one(item))  # type: ignore[arg-type]
                task.add_done_callback(look)
                tasks.append(task)
            if not tasks:
                return
            # Without a turn of the loop for each result, a run of results would hold up what is in
            # flight.
            await asyncio.sleep(0)
            if not tasks[0].done():
                await asyncio.wait((tasks[0], failed), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result().result()
            yield tasks.popleft().result()
    finally:
        failed.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
