"""Run a function, or the command line, on N gloo processes.

They are not forked from the tests' own process, whose threads they would miss, but from one that has imported what they need
(`preloaded`) and done nothing else.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megacode.launch import free_port
from megacode.recipe.schema import Parallel

ROOT = Path(__file__).parents[1]


def prepare() -> None:
    """Let it import, before the first user of multiprocessing's fork server says what that is to import."""
    if not torch.cuda.is_available():
        forkserver.set_forkserver_preload(["tests.preloaded"])
        forkserver.ensure_running()


def start(target: Callable[..., None], arguments: Sequence[tuple]) -> list[int]:
    """`target(*arguments[i])` in a process each; their exit codes. When one fails, the others have 20 seconds left."""
    context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    processes = [context.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    last = float("inf")
    while any(process.is_alive() for process in processes):
        if last == float("inf") and any(process.exitcode for process in processes):
            last = time.monotonic() + 20
        if time.monotonic() > last:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode or 0 for process in processes]


def _worker(
    rank: int,
    size: int,
    port: int,
    folder: str,
    parallel: Parallel,
    function: Any,
    arguments: tuple,
) -> None:
    torch.set_num_threads(1)
    from megacode.megatron import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megacode.megatron.distributed import Launch, initialize, shutdown

    try:
        world = initialize(parallel, 1234, Launch(rank, size, rank, "127.0.0.1", port, "test"))
        result = function(world, *arguments)
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
        shutdown()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def run_on(
    size: int, function: Callable[..., Any], *arguments: Any, parallel: Parallel | None = None
) -> list[Any]:
    """Results of `function(world, *arguments)` of every rank, in order of rank. The function must be importable."""
    with TemporaryDirectory() as folder:
        port = free_port()
        of_ranks = [
            (rank, size, port, folder, parallel or Parallel(), function, arguments)
            for rank in range(size)
        ]
        codes = start(_worker, of_ranks)
        if any(codes):
            errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
            raise AssertionError("\n".join(errors) or f"exit codes {codes}")
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _command(
    arguments: Sequence[str], environment: dict[str, str], output: str, errors: str
) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((output, 1), (errors, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    from megacode.cli.main import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def command(
    arguments: Sequence[str], environment: dict[str, str], ranks: int = 0
) -> subprocess.CompletedProcess[str]:
    """`megacode ARGUMENTS`; with `ranks` on that many processes, as torchrun starts them."""
    launched = [{}] if not ranks else [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }
        for rank in range(ranks)
    ]  # fmt: skip
    port = {"MASTER_PORT": str(free_port())} if ranks else {}
    with TemporaryDirectory() as folder:
        of_ranks = [
            (
                arguments,
                {**os.environ, **port, **of_rank, **environment},
                f"{folder}/{rank}.out",
                f"{folder}/{rank}.err",
            )
            for rank, of_rank in enumerate(launched)
        ]
        codes = start(_command, of_ranks)
        output, errors = (
            "".join(Path(folder, f"{rank}.{ending}").read_text() for rank in range(len(of_ranks)))
            for ending in ("out", "err")
        )
    return subprocess.CompletedProcess(
        ["megacode", *arguments], next((code for code in codes if code), 0), output, errors
    )
