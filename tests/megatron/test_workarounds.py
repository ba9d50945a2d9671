"""The queue through which checkpoint writers report."""

from __future__ import annotations

import multiprocessing
import queue
from dataclasses import dataclass

import pytest

from megacode.megatron.workarounds import ResultsQueue


@dataclass(frozen=True)
class Result:
    rank: int


def test_what_a_forked_copy_puts_arrives_in_order() -> None:
    results = ResultsQueue()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for rank in range(2):
        writer = multiprocessing.get_context("fork").Process(
            target=results.put, args=(Result(rank),)
        )
        writer.start()
        writer.join(30)
    assert [results.get_nowait(), results.get_nowait()] == [Result(0), Result(1)]
