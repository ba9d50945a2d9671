"""The queue through which checkpoint writers report."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megacode.megatron.results_queue import ApartQueue


@dataclass(frozen=True)
class Result:
    rank: int


def test_what_a_forked_copy_puts_arrives_in_order() -> None:
    results = ApartQueue()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for rank in range(2):
        writer = multiprocessing.get_context("fork").Process(
            target=results.put, args=(Result(rank),)
        )
        writer.start()
        writer.join(30)
    assert [results.get_nowait(), results.get_nowait()] == [Result(0), Result(1)]


def test_its_process_outlives_signals_and_imports_nothing_of_the_results() -> None:
    results = ApartQueue()
    process = results._manager._process  # type: ignore[attr-defined]
    results.put(torch.Size([2, 3]))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)
    time.sleep(0.2)
    assert process.is_alive()
    mapped = Path(f"/proc/{process.pid}/maps")
    if mapped.exists():
        assert "torch" not in mapped.read_text()
    assert results.get_nowait() == torch.Size([2, 3])


SIGNALLED_FROM_THE_START = """
import os, signal, sys, threading, time
from megacode.megatron.results_queue import ApartQueue
heard, over = set(), threading.Event()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.add(number))

def signals():
    while not over.is_set():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(0, number)
        time.sleep(0.0005)

thread = threading.Thread(target=signals, daemon=True)
thread.start()
results = ApartQueue()
over.set()
thread.join()
results.put("whole")
print(results.get_nowait(), len(heard))
"""


def test_signals_while_it_starts_do_not_reach_it() -> None:
    command = [sys.executable, "-c", SIGNALLED_FROM_THE_START]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("whole 3\n", "")
