"""Megatron-Core's optimizer and its state in a checkpoint, part by part: it chains several where parameters differ in kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def parts_with_state(optimizer: Any, state: dict[Any, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each of Megatron-Core's optimizers that has parameters here, with its own part of `state`: a chain of one stores that as it
    is, a longer one by number (megatron/core/optimizer/optimizer.py, ChainedOptimizer)."""
    parts = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    for number, part in enumerate(parts):
        if part.optimizer is not None:
            yield part, state if len(parts) == 1 else state[number]
