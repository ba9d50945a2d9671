"""Which documents were in step N: from the recipe and the corpora's indexes alone, for any step."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megacode.data.loader import StepReader
from megacode.data.loss_marks import ANSWER, FIRST, ROLES, trained
from megacode.data.mixture import OpenMixture, SampleOrigin, open_mixture
from megacode.data.planning import plan_with_data
from megacode.data.records import read_records
from megacode.data.source import DocumentPart
from megacode.errors import UserError
from megacode.plan.plan import PhasePlan
from megacode.plan.trajectory import recorded
from megacode.recipe.load import load_recipe
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

SHOWN = 32
"""Tokens of each document of which the text is shown."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One step of a run: `step` counts from 0; metrics.jsonl and the command line count from 1."""

    mixture: OpenMixture
    step: int
    tokenizer: Tokenizer | None

    @property
    def phase(self) -> PhasePlan:
        return self.mixture.plan.phase_at(self.step)

    def samples(self) -> list[SampleOrigin]:
        """The step's batch, sample by sample."""
        return self.mixture.describe(self.step)

    def text(self, origin: SampleOrigin, part: DocumentPart) -> str:
        """The first characters that a sample shows of a document, before fill-in-the-middle.

        UserError without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                "tokenizer: the recipe names none, and text needs one; give "
                "--set tokenizer.path=FILE"
            )
        start, count = part.document.start + part.first, min(part.tokens, SHOWN)
        ids = self.mixture.sources[origin.stream.source].read(np.array([start]), count)[0]
        return self.tokenizer.decode(ids, control=True)

    def sample(self, place: int) -> dict[str, Any]:
        """One sample as training sees it, after fill-in-the-middle: `tokens` (S), `labels`,
        `loss_mask` and, with a tokenizer, `text`. UserError if the batch has no such place."""
        size = self.phase.batch_size(self.step)
        if not 0 <= place < size:
            raise UserError(
                f"--sample {place}: step {self.step + 1} has {size} sequences, 0 to {size - 1}"
            )
        batch = StepReader(self.mixture, tokenizer=self.tokenizer).sample(self.step, place)
        tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
        ids, tokenizer = [*tokens, labels[-1]], self.tokenizer
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": batch.loss_mask[0].astype(int).tolist(),
            "text": tokenizer.decode(ids, control=True) if tokenizer else None,
        }

    def digest(self) -> str:
        """The digest of the step's batch, as metrics.jsonl has it."""
        reader = StepReader(self.mixture, micro_batch_size=1, tokenizer=self.tokenizer)
        return f"{reader.read(self.step).digest:016x}"


def open_trace(run_or_recipe: Path, step: int, overrides: tuple[str, ...] = ()) -> Trace:
    """Step number `step` (from 1) of a run's folder or of a recipe. UserError if there is none."""
    path = run_or_recipe / "recipe.yaml" if run_or_recipe.is_dir() else run_or_recipe
    if run_or_recipe.is_dir() and not path.is_file():
        raise UserError(
            f"{run_or_recipe}: is no run (it has no recipe.yaml); give a run's folder or a recipe"
        )
    recipe = load_recipe(path, overrides)
    if run_or_recipe.is_dir():
        recipe = recorded(recipe, run_or_recipe)
    plan = plan_with_data(recipe, path)
    if not 1 <= step <= plan.total_steps:
        raise UserError(f"--step {step}: the run has steps 1 to {plan.total_steps:,}")
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    return Trace(open_mixture(plan), step - 1, tokenizer)


def recorded_digest(run: Path, step: int) -> str | None:
    """The digest that a run's metrics.jsonl has of the batch of step `step` (from 1), or None."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None
    found = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed run's torn last line
            continue
        if record.get("kind") == "train" and record.get("step") == step:
            found = record.get("batch")
    return found


def as_dict(trace: Trace, origin: SampleOrigin, with_text: bool) -> dict[str, Any]:
    """A sample as plain data. Ranges are [first, end) in tokens; `file` and `record` are None for a
    dataset without records."""
    documents = []
    for part in origin.parts:
        prefix, number = part.document.prefix, part.document.document
        records = _records(prefix)
        file, record = records.origin(number) if records else (None, None)
        documents.append(
            {
                "shard": str(prefix),
                "document": number,
                "first": part.first,
                "end": part.first + part.tokens,
                "document_tokens": part.document.tokens,
                **_answers(trace, origin, part),
                "file": file,
                "record": record,
                **_synthesis(file, record),
            }
        )
        if with_text:
            documents[-1]["text"] = trace.text(origin, part)
    stream = origin.stream
    return {
        "sample": origin.position,
        "source": stream.source,
        "stream": stream.label,
        "epoch": origin.epoch,
        "packing": stream.packing,
        "fim_rate": stream.fim_rate,
        "documents": documents,
    }


def _answers(trace: Trace, origin: SampleOrigin, part: DocumentPart) -> dict[str, int]:
    """Of a part of a conversation its answers, of a pair its members; and how many of its tokens
    have a loss."""
    marks = trace.mixture.sources[origin.stream.source].marks
    if marks is None:
        return {}
    place = [[(part.document.start + part.first, part.tokens)]]
    own = marks.read_pieces(place, part.tokens, 0)[0][0]
    count = int(trained(own, origin.stream.loss_on).sum())
    if (own & ROLES).any():
        return {"members": int(((own & FIRST) != 0).sum()), "trained_tokens": count}
    answers = np.diff((own & ANSWER) != 0, prepend=False)
    return {"answers": -(-int(answers.sum()) // 2), "trained_tokens": count}


_records = lru_cache(maxsize=256)(read_records)


def _synthesis(file: str | None, record: int | None) -> dict[str, Any]:
    """Of a row that `megacode synthesize` made: its operator, parent record and models."""
    lines = None if file is None else _synthesized_lines(Path(file))
    if lines is None or record is None or not 0 < record < len(lines):
        return {}
    with open(str(file), "rb") as rows:
        rows.seek(lines[record - 1])
        found = json.loads(rows.read(lines[record] - lines[record - 1])).get("synthesis")
    return {} if found is None else {"synthesis": found}


@lru_cache(maxsize=16)
def _synthesized_lines(path: Path) -> list[int] | None:
    """Where the lines of a file of rows begin, and its end; None for another file."""
    note = path.with_name(path.name.replace("rows", "manifest").removesuffix("l"))
    if not (path.name.startswith("rows") and path.is_file() and note.is_file()):
        return None
    with open(path, "rb") as rows:
        return [0, *itertools.accumulate(map(len, rows))]
