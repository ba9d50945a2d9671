"""Laws of a run's numbers on disk: whole lines only, and curves that never double back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.run.metrics import FILE, MetricsWriter, read_metrics, scalars


def train_record(step: int, **more: object) -> dict:
    return {
        "kind": "train",
        "step": step,
        "phase": "first",
        "loss": 5.0 - step / 10,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "tokens": step * 4 * 16,
        "seconds": 0.5,
        "tokens_per_second": 128.0,
        "tflops_per_device": 0.1,
        "mfu": None,
        "memory_gb": None,
        "loss_by_source": {"python": 4.0, "docs": 5.0},
        "loss_by_domain": {"code": 4.0, "text": 5.0},
        "samples_by_source": {"python": step * 3, "docs": step},
        "tokens_by_source": {"python": step * 48, "docs": step * 16},
        "ratio_by_domain": {"code": 0.75, "text": 0.25},
        "batch": "00ff",
        **more,
    }


def write(run: Path, steps: range, first_step: int = 0, tensorboard: bool = False) -> None:
    with MetricsWriter(run, tensorboard, first_step) as writer:
        for step in steps:
            writer.write(train_record(step))


def steps(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    records = read_metrics(tmp_path / FILE)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[0]["loss_by_source"] == {"python": 4.0, "docs": 5.0}


def test_every_line_is_there_when_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(train_record(1))
        assert steps(tmp_path) == [1]


def test_a_torn_last_line_is_skipped_and_trimmed_at_the_next_start(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-30])
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, range(3, 5), first_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_resume_drops_everything_later(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11))
    with MetricsWriter(tmp_path, tensorboard=False, first_step=10) as writer:
        writer.event(12, "checkpoint")
    write(tmp_path, range(7, 9), first_step=6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_uninterrupted_and_a_resumed_run_write_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "straight", range(1, 11))
    write(tmp_path / "killed", range(1, 8))
    write(tmp_path / "killed", range(6, 11), first_step=5)
    assert (tmp_path / "killed" / FILE).read_text() == (tmp_path / "straight" / FILE).read_text()


def test_numbers_that_are_not_finite_become_null_and_stay_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(train_record(1, loss=float("nan"), loss_by_source={"a": math.inf}))
    line = (tmp_path / FILE).read_text()
    assert "NaN" not in line and "Infinity" not in line
    record = json.loads(line)
    assert record["loss"] is None and record["loss_by_source"] == {"a": None}


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / FILE
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path)


def test_tags_say_loss_by_source_and_domain() -> None:
    tags = scalars(train_record(1))
    assert tags["loss/train"] == pytest.approx(4.9)
    assert tags["loss/train/source/python"] == 4.0
    assert tags["loss/train/domain/text"] == 5.0
    assert tags["tokens/source/python"] == 48
    assert "throughput/mfu" not in tags and "memory/peak_gb" not in tags
    valid = scalars(
        {
            "kind": "validation",
            "step": 1,
            "loss_by_source": {"python": 1.0},
            "loss_by_domain": {"code": 1.0},
        }
    )
    assert valid == {"loss/valid/source/python": 1.0, "loss/valid/domain/code": 1.0}
    assert scalars({"kind": "event", "step": 1, "event": "start"}) == {}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 11), tensorboard=True)
    write(tmp_path, range(6, 9), first_step=5, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [e.step for e in board.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.step for e in board.Scalars("tokens/source/python")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megacode.run.metrics import MetricsWriter;"
        f"MetricsWriter(Path({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
