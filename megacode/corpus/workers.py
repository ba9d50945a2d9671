"""Tasks on several processes, first come first served, with messages on the way.

Worker processes are not forked from this one, which draws a progress bar on a thread and may hold
locks of libraries. They are forked from a server that has imported what they need
(`prepare_workers`), or spawned. A worker that dies (killed for memory, say) ends the run with a
sentence; workers end when their parent dies.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import selectors
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from megacode.errors import UserError
from megacode.launch import without_main

Message = TypeVar("Message")
Task = TypeVar("Task")
Context = TypeVar("Context")
Result = TypeVar("Result")
Make = Callable[[Context], Callable[[Task], Iterator[Message]]]
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATH_IS_WRONG = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def prepare_workers(modules: Sequence[str]) -> None:
    """Start a process that imports `modules` while this one goes on. Workers are then forked from
    it, at once."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(list(modules))
        with without_main():
            forkserver.ensure_running()


class Workers:
    """Up to `count` processes, each started when there is a task for it. With one, tasks are done
    in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._started: list[tuple[Connection, Any]] = []
        """Each worker's pipe and process."""
        self._messages = selectors.DefaultSelector()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._messages.close()
        for connection, process in self._started:
            if error:
                process.terminate()
            connection.close()  # which ends a process that waits for work
            process.join()

    def run(
        self,
        make: Make[Context, Task, Message],
        context: Context,
        tasks: Iterable[Task],
        most: int | None = None,
    ) -> Iterator[Message]:
        """Every message of `make(context)(task)` for every task, as they come, from `most`
        processes at most.

        `make` runs once in each worker and must be importable. In one process, tasks are done in
        order. UserError for a worker's UserError, a full disk and a worker that died; RuntimeError
        with the traceback for others.
        """
        if self.count == 1:
            with readable_errors():
                work = make(context)
                for task in tasks:
                    yield from work(task)
            return
        waiting = iter(tasks)
        busy = 0
        # In this order zip takes no task without a worker.
        for number, task in zip(range(min(self.count, most or self.count)), waiting, strict=False):
            if number == len(self._started):
                self._start()
            connection, _ = self._started[number]
            connection.send((make, context))
            connection.send(task)
            busy += 1
        while busy:
            for key, _ in self._messages.select():
                connection, process = key.data
                try:
                    what, value = connection.recv()
                except (EOFError, OSError):
                    raise _death(process) from None
                if what == "message":
                    yield value
                elif what == "done":
                    following = next(waiting, None)
                    connection.send(following)
                    busy -= following is None
                elif what == "user":
                    raise UserError(value)
                else:
                    raise RuntimeError(f"in a worker process:\n{value}")

    def map(
        self,
        function: Callable[..., Result],
        arguments: Iterable[tuple[Any, ...]],
        most: int | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """(i, function(*arguments[i])) for all arguments, as they come."""
        return self.run(_call, function, enumerate(arguments), most)

    def _start(self) -> None:
        server = getattr(forkserver, "_forkserver", None)
        prepared = getattr(server, "_forkserver_pid", None)
        start: Any = multiprocessing.get_context("forkserver" if prepared else "spawn")
        here, there = start.Pipe()
        process = start.Process(target=_serve, args=(there,), daemon=True)
        with without_main():
            process.start()
        there.close()
        self._started.append((here, process))
        self._messages.register(here, selectors.EVENT_READ, self._started[-1])


def _call(function: Callable[..., Any]) -> Callable[[Any], Iterator[Any]]:
    return lambda task: iter([(task[0], function(*task[1]))])


def _death(process: Any) -> UserError:
    process.join(5)
    code = process.exitcode
    how = f"by signal {-code}; out of memory?" if code and code < 0 else f"with exit code {code}"
    return UserError(f"a worker process ended {how}; run again to go on, with fewer --workers")


def _serve(connection: Connection) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with suppress(ConnectionError):  # the parent is gone: nobody to tell
        try:
            for make, context in _received(connection):
                work = make(context)
                for task in _received(connection):
                    for message in work(task):
                        connection.send(("message", message))
                    connection.send(("done", None))
        except ConnectionError:
            raise
        except UserError as error:
            connection.send(("user", str(error)))
        except OSError as error:
            shown = _readable(error)
            user = isinstance(shown, UserError)
            connection.send(("user", str(shown)) if user else ("crash", traceback.format_exc()))
        except BaseException:
            connection.send(("crash", traceback.format_exc()))


def _received(connection: Connection) -> Iterator[Any]:
    """What the parent sends, up to None or the end of the parent."""
    with suppress(EOFError, ConnectionError):
        while (value := connection.recv()) is not None:
            yield value


@contextmanager
def readable_errors() -> Iterator[None]:
    """UserError in place of an OSError that a user can mend."""
    try:
        yield
    except OSError as error:
        raise _readable(error) from None


def _readable(error: OSError) -> Exception:
    """A full disk or quota and a path that cannot be written as UserError; any other error as it
    is."""
    if error.errno in _DISK_IS_FULL:
        where = f" ({error.filename})" if error.filename else ""
        return UserError(f"the disk of the output is full{where}; make room and run again to go on")
    if error.errno in _PATH_IS_WRONG and error.filename:
        return UserError(
            f"{error.filename}: {error.strerror}; change its rights, or choose another path"
        )
    return error


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
