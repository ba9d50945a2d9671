"""Run a function on N gloo processes, each with Megatron-Core's parallel state: spawned, because fork with gloo deadlocks."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.multiprocessing as mp

from megacode.recipe.schema import Parallel
from megacode.runtime.launch import free_port


def _worker(rank: int, size: int, port: int, folder: str, parallel: Parallel, function: Any, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    from megacode.runtime import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megacode.runtime.distributed import Launch, initialize, shutdown

    try:
        world = initialize(parallel, 1234, Launch(rank, size, rank, "127.0.0.1", port, "test"))
        result = function(world, *arguments)
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
        shutdown()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def run_on(size: int, function: Callable[..., Any], *arguments: Any, parallel: Parallel | None = None) -> list[Any]:
    """Results of `function(world, *arguments)` of every rank, in order of rank. The function must be importable."""
    with TemporaryDirectory() as folder:
        try:
            mp.spawn(
                _worker,
                (size, free_port(), folder, parallel or Parallel(), function, arguments),
                nprocs=size,
                join=True,
            )
        except Exception as error:
            errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
            raise AssertionError("\n".join(errors) or str(error)) from None
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(size)]
