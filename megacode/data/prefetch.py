"""Prepare a few items ahead on a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetch(Iterator[T], Generic[T]):
    """Iterates over `make(key)` for each key, up to `depth` prepared ahead; depth 0 makes each when it is asked for.

    An exception in `make` comes out of the `next` that would have given its item, after the items before it. `close`,
    the end of a `with` block, or losing the last reference stops the thread, which holds no reference to this object.
    """

    def __init__(self, make: Callable[[int], T], keys: Iterable[int], depth: int) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth == 0:
            self._items: Iterator[T] = map(make, keys)
            return
        ready: queue.Queue[object] = queue.Queue(maxsize=depth)
        self._thread = threading.Thread(
            target=_fill, args=(make, keys, ready, self._stop), name="megacode-prefetch", daemon=True
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


def _fill(make: Callable[[int], T], keys: Iterable[int], ready: queue.Queue[object], stop: threading.Event) -> None:
    item: object
    for key in keys:
        try:
            item = make(key)
        except BaseException as error:
            item = _Failure(error)
        if not _put(ready, item, stop) or isinstance(item, _Failure):
            return
    _put(ready, _END, stop)


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
