"""A run's numbers on disk: `metrics.jsonl`, one JSON object a line, and the same for TensorBoard.

docs/metrics.md lists every key. Two promises:

1. A line counts once its newline is written. A killed run leaves at most one torn last line,
   which reading skips and the next start trims.
2. After a resume at step n neither file has a record of a later step: a curve never doubles back.

A number that is not finite is written as `null`, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import write_text
from megacode.run.loggers import Logger

FILE = "metrics.jsonl"
Record = dict[str, Any]

_TAGS: dict[str, dict[str, str]] = {
    "train": {
        "loss/train": "loss",
        "objective/contrastive": "contrastive",
        "objective/contrastive_accuracy": "contrastive_accuracy",
        "objective/weighted_tokens": "weighted_tokens",
        "precision/loss_bf16": "loss_bf16",
        "precision/drift": "drift",
        "gradient_norm": "grad_norm",
        "learning_rate": "learning_rate",
        "batch_size": "batch_size",
        "tokens/total": "tokens",
        "throughput/tokens_per_second": "tokens_per_second",
        "throughput/tflops_per_device": "tflops_per_device",
        "throughput/mfu": "mfu",
        "throughput/seconds_per_step": "seconds",
        "memory/peak_gb": "memory_gb",
        "loss/train/source": "loss_by_source",
        "loss/train/domain": "loss_by_domain",
        "tokens/source": "tokens_by_source",
        "ratio/domain": "ratio_by_domain",
    },
    "validation": {
        "loss/valid/source": "loss_by_source",
        "loss/valid/domain": "loss_by_domain",
        "bits_per_byte/source": "bits_per_byte_by_source",
        "bits_per_byte/domain": "bits_per_byte_by_domain",
    },
}
"""TensorBoard's tag -> key of the record, by kind; an object has a tag for each of its names."""


def read_metrics(path: str | Path) -> list[Record]:
    """Every record of a metrics file (or of a run folder's) in order, without a torn last line.

    Raises:
        UserError: there is no such file, or a line before the last one is no record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        lines = path.read_bytes().split(b"\n")[
            :-1
        ]  # after the last newline: nothing, or a torn line
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); a run writes it from its first step on"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise UserError(
                f"{path}, line {number}: is no record (a JSON object with `kind` and `step`); "
                "remove it"
            )
    return records


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends records to a run's metrics. A context manager; only rank 0 has one.

    Args:
        tensorboard: also write TensorBoard events.
        first_step: finished steps that this start goes on after. Records of later steps are dropped
            first: the file is rewritten whole, or not at all.
        loggers: get the same values as TensorBoard; they are closed with this.
    """

    def __init__(
        self,
        run: Path,
        tensorboard: bool = True,
        first_step: int = 0,
        loggers: Sequence[Logger] = (),
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        if (run / FILE).exists():
            _drop_after(run / FILE, first_step)
        self._file = (run / FILE).open("a", buffering=1, encoding="utf-8")
        self._events = _EventFile(run / "tensorboard", first_step) if tensorboard else None
        self._loggers = loggers

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record of JSON's types with `kind` and `step`."""
        record = _finite(record)
        line = json.dumps(record, allow_nan=False, separators=(",", ":"), default=str)
        self._file.write(line + "\n")  # one call: a reader sees whole lines, or a torn last one
        values = scalars(record)
        if self._events:
            self._events.add(record["step"], values)
        for logger in self._loggers:
            logger.add(record["step"], values)

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Append an event: start, resume, checkpoint, phase, end ..."""
        self.write({"kind": "event", "step": step, "event": event, **facts})

    def flush(self) -> None:
        """Put everything on the disk, before a checkpoint claims that these steps happened."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events:
            self._events.writer.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._events:
            self._events.writer.close()
        for logger in self._loggers:
            logger.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Tags and values of a record for TensorBoard and other loggers; none for an event."""
    values: dict[str, Any] = {}
    for tag, key in _TAGS.get(record["kind"], {}).items():
        value = record.get(key)
        if isinstance(value, Mapping):
            values |= {f"{tag}/{name}": number for name, number in value.items()}
        else:
            values[tag] = value
    for name, numbers in record.get("tasks", {}).items():
        own = {key: number for key, number in numbers.items() if key not in ("items", "cut")}
        for group, number in own.pop("groups", {}).items():
            own[f"group {group}"] = number
        values |= {f"task/{name}/{key}": number for key, number in own.items()}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def _drop_after(path: Path, step: int) -> None:
    """Drop a torn last line, and records of steps after `step`."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
    if path.stat().st_size != len(text):
        write_text(path, text)


def _finite(value: Any) -> Any:
    """A copy in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _EventFile:
    """TensorBoard's event file.

    All scalars of a step are one event, which costs a twentieth of an event for each. Events of
    steps after `first_step` that the folder holds are forgotten.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        resumed = folder.exists()
        self.writer = EventFileWriter(str(folder), flush_secs=30)
        if resumed:
            self._add(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            pairs = [self._summary.Value(tag=t, simple_value=v) for t, v in values.items()]
            self._add(step, summary=self._summary(value=pairs))

    def _add(self, step: int, **content: Any) -> None:
        self.writer.add_event(self._event(step=step, wall_time=time.time(), **content))
