"""Start N local processes of one command, as torchrun does, and end when they end.

A cluster uses `srun` or `torchrun`, which `megacode.megatron.distributed.read_launch` understands.
Where `srun` starts one task a node, each task starts its node's processes with `launch`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacode.errors import UserError
from megacode.signals import STOPPING, unblocked

STOPPED = 75
"""Exit code of a run that saved and stopped at a signal (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of several launchers meet; this one is number `launcher` of `launchers`."""

    address: str
    port: int
    launcher: int
    launchers: int


def free_port() -> int:
    """A TCP port that nobody listens on at this moment.

    It is below the range from which systems give ports to whoever asks for any (32768 and up on
    Linux), as connections of other processes do, and gloo's, between this call and its use.
    """
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no free TCP port: a hundred between 10000 and 30000 are all in use")


def launch(
    arguments: Sequence[str],
    processes: int,
    grace_seconds: float = 60.0,
    among: Rendezvous | None = None,
) -> int:
    """Run `python -m megacode.cli ARGUMENTS` in `processes` local processes and wait for all.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to every process, which saves and stops. When one
    fails, the others get SIGTERM and, after `grace_seconds`, SIGKILL: they would wait for the dead
    process in a collective.

    `among`: this is one of several launchers with as many processes each; their ranks are one
    world.

    Returns:
        0, `STOPPED`, or the exit code of the process that failed first.
    """
    if processes < 1:
        raise UserError(f"--processes: expected 1 or more, not {processes}")
    cores = os.cpu_count() or 1
    among = among or Rendezvous("127.0.0.1", free_port(), 0, 1)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes * among.launchers),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": among.address,
        "MASTER_PORT": str(among.port),
        # Without this each process would start a thread per core and they would fight.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "megacode.cli", *arguments],
            env={
                **environment,
                "RANK": str(among.launcher * processes + local),
                "LOCAL_RANK": str(local),
            },
        )
        for local in range(processes)
    ]

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        with unblocked(STOPPING):
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
            if code and code != STOPPED and not failed:
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
        (
            c.returncode if c.returncode > 0 else 128 - c.returncode
            for c in children
            if c.returncode
        ),
        0,
    )


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes that multiprocessing starts inside the context do not run this script again.

    A script without `if __name__ == "__main__":` would start over in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
