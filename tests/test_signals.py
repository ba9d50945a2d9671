"""Requests to stop that come while nobody can heed them."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from megacode.cli.main import main
from megacode.signals import blocked, discard_pending, unblocked

USR1 = [signal.SIGUSR1]


def tell() -> None:
    """This thread: pytest's process has others, which hold nothing back."""
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)


def test_a_held_back_signal_comes_where_it_is_let_through() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with blocked(USR1):
            tell()
            assert not heard
            with unblocked(USR1):
                assert heard == USR1
            tell()
            discard_pending(USR1)
        assert heard == USR1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_one_that_no_step_heeded_does_not_hide_the_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left waiting, it would end the process in place of exit code 2."""
    with blocked(USR1):
        tell()
        try:
            assert main(["train", str(tmp_path / "none.yaml")]) == 2
            assert "none.yaml" in capsys.readouterr().err
            assert signal.SIGUSR1 not in signal.sigpending()
        finally:
            discard_pending(USR1)
