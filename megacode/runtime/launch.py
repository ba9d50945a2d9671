"""Start N local processes of one command, as torchrun would, and end as one: for a laptop and for tests.

A cluster uses `torchrun` or `srun`; both are understood by `megacode.runtime.distributed.read_launch`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from megacode.errors import UserError


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(arguments: Sequence[str], processes: int, grace_seconds: float = 60.0) -> int:
    """Run `python -m megacode.cli ARGUMENTS` in `processes` local processes and wait for all.

    SIGINT and SIGTERM go on to every process (they save and stop). When one fails, the others get SIGTERM and, after
    `grace_seconds`, SIGKILL: peers of a dead process would wait for it in a collective.

    Returns:
        0, or the exit code of the process that failed first.
    """
    if processes < 1:
        raise UserError(f"--processes: expected 1 or more, not {processes}")
    cores = os.cpu_count() or 1
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # Without this each process would start a thread per core and they would fight.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "megacode.cli", *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children, grace_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()


def _wait(children: list[subprocess.Popen[bytes]], grace_seconds: float) -> int:
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        for child in children:
            code = child.poll()
            if code and not failed:
                failed = code if code > 0 else 128 - code
                deadline = time.monotonic() + grace_seconds
                for other in children:
                    if other.poll() is None:
                        other.terminate()
        if time.monotonic() > deadline:
            for other in children:
                if other.poll() is None:
                    other.kill()
        time.sleep(0.05)
    return failed or next(
        (c.returncode if c.returncode > 0 else 128 - c.returncode for c in children if c.returncode), 0
    )
