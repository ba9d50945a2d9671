"""Prepare a few items ahead on a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over `items`, of which a thread prepares up to `depth` ahead; depth 0 prepares each when it is asked for.

    An exception in `items` comes out of the `next` that would have given its item, after the items before it. `close`,
    the end of a `with` block, or losing the last reference stops the thread, which holds no reference to this object.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth == 0:
            self._items: Iterator[T] = iter(items)
            return
        ready: queue.Queue[object] = queue.Queue(maxsize=depth)
        self._thread = threading.Thread(
            target=_fill, args=(items, ready, self._stop), name="megacode-prefetch", daemon=True
        )
        self._items = _drain(ready)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        return next(self._items)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for the item it is at. Nothing comes after it; closing twice is fine."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _fill(items: Iterable[T], ready: queue.Queue[object], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, item, stop):
                return
        _put(ready, _END, stop)
    except BaseException as error:
        _put(ready, _Failure(error), stop)


def _put(ready: queue.Queue[object], item: object, stop: threading.Event) -> bool:
    """False if the consumer is gone."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _drain(ready: queue.Queue[object]) -> Iterator[T]:
    while (item := ready.get()) is not _END:
        if isinstance(item, _Failure):
            raise item.error
        yield item  # type: ignore[misc]
