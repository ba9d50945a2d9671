"""Python's garbage collector in step with training.

Left alone, the collector runs on every rank at another moment, and the other ranks wait for it in
the next collective. So it is off during training, and all ranks collect after the same steps (as
Megatron-LM with `--manual-gc`, and torchtitan).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY = 50  # steps


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Inside, Python collects only when told, and never what was there before."""
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
    """Collect if it is due after `done` finished steps."""
    if done % EVERY == 0:
        gc.collect()
