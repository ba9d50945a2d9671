"""Tasks on several processes, first come first served, with messages on the way.

Workers are not forked from this process, which draws a progress bar from a thread and may hold a library's locks, but from
a server that has imported what they need (`prepare_workers`), or spawned. A worker that dies (killed for memory, say) ends
the whole with a sentence; a parent that dies ends its workers.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megacode.errors import UserError
from megacode.launch import without_main

Message = TypeVar("Message")
Task = TypeVar("Task")
Context = TypeVar("Context")
Result = TypeVar("Result")
_PATHS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
Make = Callable[[Context], Callable[[Task], Iterator[Message]]]


def prepare_workers(modules: Sequence[str]) -> None:
    """Start a process that imports `modules` while this one goes on; workers are then copies of it, there at once."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(list(modules))
        with without_main():
            forkserver.ensure_running()


def _context() -> Any:
    server = getattr(forkserver, "_forkserver", None)
    return multiprocessing.get_context(
        "forkserver" if getattr(server, "_forkserver_pid", None) else "spawn"
    )


def run_tasks(
    make: Make[Context, Task, Message], context: Context, tasks: Iterable[Task], workers: int
) -> Iterator[Message]:
    """Every message of `make(context)(task)` for every task, as they come, from up to `workers` processes.

    `make` runs once in each worker and must be importable. With one worker all is done in this process, in order.
    UserError for a worker's UserError, a full disk and a worker that died; RuntimeError with the traceback for others.
    """
    if workers == 1:
        yield from _here(make, context, tasks)
        return
    start = _context()
    waiting = iter(tasks)
    processes: dict[Connection, Any] = {}
    try:
        for _, task in zip(
            range(workers), waiting, strict=False
        ):  # in this order zip takes no task it does not give
            here, there = start.Pipe()
            process = start.Process(target=_serve, args=(there, make, context), daemon=True)
            with without_main():
                process.start()
            there.close()
            here.send(task)
            processes[here] = process
        busy = set(processes)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                try:
                    what, value = connection.recv()
                except (EOFError, OSError):
                    raise _death(processes[connection]) from None
                if what == "message":
                    yield value
                elif what == "done":
                    following = next(waiting, None)
                    connection.send(following)
                    if following is None:
                        busy.discard(connection)
                else:
                    raise (
                        UserError(value)
                        if what == "user"
                        else RuntimeError(f"in a worker process:\n{value}")
                    )
    finally:
        for connection, process in processes.items():
            if connection in busy:
                process.terminate()
            process.join()
            connection.close()


def map_tasks(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Result]]:
    """(i, function(*arguments[i])) for all arguments, as they come; see `run_tasks`."""
    return run_tasks(_call, function, enumerate(arguments), max(1, min(workers, len(arguments))))


def _call(function: Callable[..., Any]) -> Callable[[Any], Iterator[Any]]:
    return lambda task: iter([(task[0], function(*task[1]))])


def _here(make: Make[Any, Any, Any], context: Any, tasks: Iterable[Any]) -> Iterator[Any]:
    with readable_errors():
        work = make(context)
        for task in tasks:
            yield from work(task)


def _death(process: Any) -> UserError:
    process.join(5)
    code = process.exitcode
    how = f"by signal {-code}; out of memory?" if code and code < 0 else f"with exit code {code}"
    return UserError(f"a worker process ended {how}; run again to go on, with fewer --workers")


def _serve(connection: Connection, make: Make[Any, Any, Any], context: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with suppress(ConnectionError):  # the parent is gone: nobody to tell
        try:
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
            shown = readable(error)
            user = isinstance(shown, UserError)
            connection.send(("user", str(shown)) if user else ("crash", traceback.format_exc()))
        except BaseException:
            connection.send(("crash", traceback.format_exc()))


def _received(connection: Connection) -> Iterator[Any]:
    """Tasks until there is none left, or no parent."""
    with suppress(EOFError, ConnectionError):
        while (task := connection.recv()) is not None:
            yield task


@contextmanager
def readable_errors() -> Iterator[None]:
    """What `readable` makes of an OSError, in place of it."""
    try:
        yield
    except OSError as error:
        raise readable(error) from None


def readable(error: OSError) -> Exception:
    """A full disk (or quota), a path that must not or cannot be written, in the words a user needs; any other error as it
    is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of the output is full{f' ({error.filename})' if error.filename else ''}; make room and run again to go on"
        )
    if error.errno in _PATHS and error.filename:
        return UserError(
            f"{error.filename}: {error.strerror}; change its rights, or choose another path"
        )
    return error


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
