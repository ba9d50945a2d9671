"""Mixtures and the losses that they led to: from a CSV or JSONL table, or from a folder of runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError
from megacode.files import read_json_lines
from megacode.run.metrics import FILE, read_metrics
from megacode.studies.sweep import open_sweep

Floats = NDArray[np.float64]
REST = "rest"
"""Domain of what shares leave to 1."""


@dataclass(frozen=True, eq=False)
class MixtureTable:
    """Runs, or steps of runs: a row each.

    Attributes:
        shares: float64 [rows, domains]; rows sum to 1.
        losses: float64 [rows, targets].
        steps: int64 [rows], finished steps; 0 where the table does not say.
        left_out: what was there and is not in the rows, in words.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    shares: Floats
    losses: Floats
    steps: NDArray[np.int64]
    left_out: tuple[str, ...] = ()

    def at(self, step: int) -> MixtureTable:
        """The rows of a step."""
        rows = self.steps == step
        return MixtureTable(
            self.domains, self.targets, self.shares[rows], self.losses[rows], self.steps[rows]
        )

    def by_mixture(self) -> tuple[MixtureTable, Floats | None]:
        """Means over rows with the same shares (seeds); and the standard deviation between these,
        [targets], None where each mixture has one row."""
        keys, group = np.unique(self.shares.round(6), axis=0, return_inverse=True)
        group = group.reshape(-1)
        counts = np.bincount(group)
        means = np.stack([self.losses[group == i].mean(0) for i in range(len(keys))])
        shares = np.stack([self.shares[group == i].mean(0) for i in range(len(keys))])
        freedom = len(group) - len(keys)
        deviation = None
        if freedom:
            deviation = np.sqrt(((self.losses - means[group]) ** 2).sum(0) / freedom)
        steps = self.steps[:1].repeat(len(counts))
        return MixtureTable(self.domains, self.targets, shares, means, steps), deviation


def read_table(path: Path) -> MixtureTable:
    """The table of a `.csv` or `.jsonl` file with columns `share.DOMAIN`, `loss.TARGET` and perhaps
    `step`, or of the runs in a folder or of a sweep's file.

    Raises:
        UserError: there are no such columns or runs, a number is missing, or shares are no shares.
    """
    rows: list[tuple[str, Mapping[str, Any]]]
    left_out: tuple[str, ...] = ()
    is_yaml = path.suffix in (".yaml", ".yml")
    if path.is_dir() or is_yaml:
        rows, left_out = _of_runs(open_sweep(path).runs if is_yaml else path)
    else:
        read = _csv(path) if path.suffix == ".csv" else read_json_lines(path, _EXPECTED)
        rows = [(f"{path}, line {line}", row) for line, row in read]
    names = list(dict.fromkeys(key for _, row in rows for key in row if key))
    domains = [name[6:] for name in names if name.startswith("share.")]
    targets = [name[5:] for name in names if name.startswith("loss.")]
    if not domains or not targets:
        raise UserError(
            f"{path}: has no columns share.DOMAIN and loss.TARGET; rename its columns so (there "
            f"are: {', '.join(names[:12]) or 'none'})"
        )
    shares = _numbers(rows, [f"share.{name}" for name in domains])
    losses = _numbers(rows, [f"loss.{name}" for name in targets])
    steps = _numbers(rows, ["step"])[:, 0] if "step" in names else np.zeros(len(rows))
    sums = shares.sum(1)
    bad = np.flatnonzero((shares < 0).any(1) | (sums > 1.01))
    if len(bad):
        raise UserError(
            f"{rows[bad[0]][0]}: its shares sum to {sums[bad[0]]:.4g}; shares are 0 or more, and 1 "
            "together (what is missing to 1 is one more domain)"
        )
    if (sums < 0.99).any():
        domains.append(REST)
        shares = np.column_stack([shares, np.maximum(1 - sums, 0)])
    shares = shares / shares.sum(1, keepdims=True)
    return MixtureTable(
        tuple(domains), tuple(targets), shares, losses, steps.astype(np.int64), left_out
    )


_EXPECTED = "give a table (.csv, or JSON lines), a sweep's file, or a folder of runs"


def _csv(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_EXPECTED}") from None
    return enumerate(csv.DictReader(lines), 2)


def _numbers(rows: list[tuple[str, Mapping[str, Any]]], names: list[str]) -> Floats:
    out = np.empty((len(rows), len(names)))
    for index, (place, row) in enumerate(rows):
        for column, name in enumerate(names):
            try:
                out[index, column] = float(row[name])
            except (KeyError, TypeError, ValueError):
                found = row.get(name)
                raise UserError(
                    f"{place}: {name}: expected a number, not {found!r}; correct it, or take the "
                    "line out"
                ) from None
            if not np.isfinite(out[index, column]):
                raise UserError(f"{place}: {name}: is not finite; take the line out")
    return out


def _of_runs(folder: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], tuple[str, ...]]:
    """Validation losses by domain of every run in a folder, at each of their steps, beside the
    shares that its plan reads to the end."""
    runs = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    rows: list[tuple[str, Mapping[str, Any]]] = []
    empty = 0
    for run in runs:
        try:
            plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
            streams = [stream for phase in plan["phases"] for stream in phase["streams"]]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run}/plan.json: cannot be read ({error}); move the run") from None
        tokens: dict[str, int] = {}
        for stream in streams:
            tokens[stream["domain"]] = tokens.get(stream["domain"], 0) + stream["tokens"]
        shares = {f"share.{name}": n / sum(tokens.values()) for name, n in tokens.items()}
        found = {r["step"]: r for r in read_metrics(run) if r["kind"] == "validation" and r["step"]}
        empty += not found
        rows += [
            (
                f"{run}, step {step}",
                {"step": step, **shares}
                | {f"loss.{name}": loss for name, loss in record["loss_by_domain"].items()},
            )
            for step, record in found.items()
        ]
    if not rows:
        raise UserError(
            f"{folder}: holds no runs with validation losses; give the folder that the runs of a "
            "sweep are in"
        )
    every = {key for _, row in rows for key in row if key.startswith("share.")}
    rows = [(place, {**dict.fromkeys(every, 0.0), **row}) for place, row in rows]
    return rows, (f"{empty} of {len(runs)} runs have no validation losses",) * bool(empty)
