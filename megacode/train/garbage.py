"""Python's garbage collector in step with training.

Left alone it runs whenever enough objects were made, on every rank at another moment, and while one rank looks for cycles the
others wait for it in the next collective: the more ranks, the more often. So it is held off, and all ranks collect after
the same steps (as Megatron-LM with `--manual-gc`, and torchtitan).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY = 50  # steps


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Inside, Python collects only when told; what is there already is not looked through again."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect_after(done: int) -> None:
    """Collect where `done` finished steps make it due."""
    if done % EVERY == 0:
        gc.collect()
