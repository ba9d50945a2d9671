"""A run's numbers on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard events with the same.

`docs/metrics.md` lists every key. Two promises: a line counts once its newline is written, so a killed run leaves at most
one torn line, which reading skips and the next start trims; and after a resume at step n nothing later than n is left, in
either file, so that a curve never doubles back. A number that is not finite is written as `null` (JSON has no NaN).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megacode.errors import UserError

FILE = "metrics.jsonl"
Record = dict[str, Any]


def read_metrics(path: str | Path) -> list[Record]:
    """Every whole record of a metrics file (or of a run folder's), in order. A torn last line is skipped.

    Raises:
        UserError: there is no such file, or a line that is not the last one is no record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); a run writes it from its first step on"
        ) from error
    lines = content.split(b"\n")
    lines.pop()  # what follows the last newline: nothing, or a torn line
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if (
            not isinstance(record, dict)
            or "kind" not in record
            or not isinstance(record.get("step"), int)
        ):
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: is no record (a JSON object with `kind` and `step`); remove it"
            )
        records.append(record)
    return records


class MetricsWriter:
    """Rank 0's pen. Open it with `MetricsWriter.open`; it is a context manager."""

    def __init__(self, file: TextIO, events: _Events | None, last_train: Record | None) -> None:
        self._file = file
        self._events = events
        self._last = last_train

    @classmethod
    def open(cls, run: Path, tensorboard: bool = True, first_step: int = 0) -> MetricsWriter:
        """Go on with a run folder's metrics after `first_step` finished steps (0: a new run), or begin them.

        Records with a later step are dropped first; the file is rewritten whole, or not at all.
        """
        run.mkdir(parents=True, exist_ok=True)
        path = run / FILE
        kept = _keep_until(path, first_step)
        had_events = (run / "tensorboard").exists()
        events = (
            _Events(run / "tensorboard", first_step + 1 if had_events else None)
            if tensorboard
            else None
        )
        last_train = next((r for r in reversed(kept) if r["kind"] == "train"), None)
        return cls(
            open(path, "a", buffering=1, encoding="utf-8"), events, last_train
        )  # closed by close()

    def write(self, record: Mapping[str, Any]) -> Record:
        """Append one record (`kind` and `step` at least; numpy and torch scalars are fine). A `train` record without
        `tokens_by_source` gets it. Returns the record as written."""
        plain: Record = _plain(record)
        if plain["kind"] == "train":
            add_tokens_by_source(plain, self._last)
            self._last = plain
        # One write call a line: another process that reads the file sees whole lines or a torn last one.
        self._file.write(json.dumps(plain, allow_nan=False, separators=(",", ":")) + "\n")
        if self._events:
            self._events.add(plain["step"], scalars(plain))
        return plain

    def event(self, step: int, event: str, **facts: Any) -> Record:
        """Append an event: start, resume, checkpoint, phase, end ..."""
        return self.write({"kind": "event", "step": step, "event": event, **facts})

    def flush(self) -> None:
        """On disk for good, before a checkpoint claims that these steps happened."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Safe to call twice."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        if self._events:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard's tags and values of a record; none for an event."""
    if record["kind"] == "train":
        names = {
            "loss/train": "loss",
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
        }
        groups = {
            "loss/train/source": "loss_by_source",
            "loss/train/domain": "loss_by_domain",
            "tokens/source": "tokens_by_source",
            "ratio/domain": "ratio_by_domain",
        }
    elif record["kind"] == "validation":
        names = {}
        groups = {"loss/valid/source": "loss_by_source", "loss/valid/domain": "loss_by_domain"}
    else:
        return {}
    values = {tag: record.get(key) for tag, key in names.items()}
    for tag, key in groups.items():
        values |= {f"{tag}/{name}": value for name, value in (record.get(key) or {}).items()}
    return {tag: float(value) for tag, value in values.items() if value is not None}


def add_tokens_by_source(record: Record, previous: Mapping[str, Any] | None) -> None:
    """Give a training record its cumulative `tokens_by_source`, from its samples and the training record before it: all
    sequences between two records of one phase have one length, which is tokens / samples."""
    samples = record.get("samples_by_source")
    if "tokens_by_source" in record or not samples or "tokens" not in record:
        return
    before = previous or {}
    old_samples = before.get("samples_by_source", {})
    old_tokens = before.get("tokens_by_source", {})
    new = {name: count - old_samples.get(name, 0) for name, count in samples.items()}
    length = (record["tokens"] - before.get("tokens", 0)) / max(sum(new.values()), 1)
    record["tokens_by_source"] = {
        name: old_tokens.get(name, 0) + round(n * length) for name, n in new.items()
    }


# -------------------------------------------------------------------------------------------------------- inside


def _keep_until(path: Path, step: int) -> list[Record]:
    """Drop a torn last line and records after `step`; returns what stays."""
    if not path.exists():
        return []
    records = [record for record in read_metrics(path) if record["step"] <= step]
    text = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records).encode()
    if path.stat().st_size != len(text):
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return records


def _plain(value: Any) -> Any:
    """Of numpy's and torch's scalars, paths and tuples, what JSON knows; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if not isinstance(value, float) and hasattr(value, "tolist"):  # arrays and tensors too
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


class _Events:
    """TensorBoard's event file, through tensorboard's own writer: all of a step's scalars are one event, which costs a
    twentieth of adding them one by one."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder), flush_secs=30)
        if purge_step is not None:
            # "Started again here": TensorBoard forgets events of this folder from this step on.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(purge_step, session_log=log)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            value = [
                self._summary.Value(tag=tag, simple_value=number) for tag, number in values.items()
            ]
            self._add(step, summary=self._summary(value=value))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
