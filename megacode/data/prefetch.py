"""Prepare a few items ahead on a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over `items`; one thread prepares up to `depth` ahead. Depth 0 uses no thread.

    An exception in `items` is raised by the `next` that would have given its item. `close`, the end
    of a `with` block, or losing the last reference stops the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = iter(items)
        self._thread = ThreadPoolExecutor(1, "megacode-prefetch") if depth else None
        self._ahead: deque[Future[T]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        assert self._thread is not None
        self._ahead.append(self._thread.submit(next, self._items))

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._items)
        if not self._ahead:
            raise StopIteration
        self._submit()
        return self._ahead.popleft().result()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread after the item it is at. No item comes afterwards."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._items = iter(())
