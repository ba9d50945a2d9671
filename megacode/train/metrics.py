"""metrics.jsonl and TensorBoard: one record a line, curves that never double back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Records of `RUN/metrics.jsonl`; a torn last line (of a killed run) is skipped. Empty if there is no file."""
    path = run / FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _truncate(run: Path, first_step: int) -> None:
    """Drop records of steps after `first_step` (they will be trained again) and any torn line; whole or not at all."""
    path = run / FILE
    if not path.exists():
        return
    kept = [r for r in read_metrics(run) if r["step"] <= first_step and not (r["kind"] == "event" and r["step"] > first_step)]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass
class MetricsWriter:
    """Appends records to a run's metrics; each line is with the operating system when `write` returns."""

    file: TextIO
    board: Any

    @classmethod
    def open(cls, run: Path, tensorboard: bool, first_step: int) -> MetricsWriter:
        """Go on after `first_step` finished steps: later records of an earlier attempt are dropped."""
        run.mkdir(parents=True, exist_ok=True)
        _truncate(run, first_step)
        board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        return cls(open(run / FILE, "a", buffering=1), board)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        if self.board is not None and record["kind"] != "event":
            for tag, value in _scalars(record):
                self.board.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """(TensorBoard tag, value) pairs of a train or validation record."""
    if record["kind"] == "validation":
        pairs = [(f"loss/validation/source/{k}", v) for k, v in record["loss_by_source"].items()]
        return pairs + [(f"loss/validation/domain/{k}", v) for k, v in record["loss_by_domain"].items()]
    pairs = [
        ("loss/train", record["loss"]),
        ("gradient_norm", record["grad_norm"]),
        ("learning_rate", record["learning_rate"]),
        ("batch_size", record["batch_size"]),
        ("throughput/tokens_per_second", record["tokens_per_second"]),
        ("throughput/tflops_per_device", record["tflops_per_device"]),
    ]
    pairs += [(f"loss/train/source/{k}", v) for k, v in record["loss_by_source"].items()]
    pairs += [(f"loss/train/domain/{k}", v) for k, v in record["loss_by_domain"].items()]
    pairs += [(f"samples/source/{k}", v) for k, v in record["samples_by_source"].items()]
    pairs += [(f"ratio/domain/{k}", v) for k, v in record["ratio_by_domain"].items()]
    for tag, key in (("throughput/mfu", "mfu"), ("memory/peak_gb", "memory_gb")):
        if record[key] is not None:
            pairs.append((tag, record[key]))
    return pairs
