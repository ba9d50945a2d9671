"""Records -> candidates -> rows, with the replies of served models.

Candidates are numbered in the order of the inputs, each record's samples together. Many are at work
at a time; they are judged in their order, so that the rows are a function of the replies alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacode.corpus.inputs import InputFile, find_inputs
from megacode.corpus.readers import BadRecord, read_input
from megacode.errors import UserError
from megacode.recipe.load import load_section
from megacode.synthesize.checks import OpenChecks, majority, open_checks
from megacode.synthesize.journal import Journal
from megacode.synthesize.operator import Operator, Outcome, Text, candidate, open_operator
from megacode.synthesize.ordered import in_order
from megacode.synthesize.output import Files, Row, is_made, write_manifest
from megacode.synthesize.schema import Synthesis
from megacode.synthesize.served import Refusal, Served, Totals

_AHEAD = 4
"""At most so many candidates at work or not yet judged for each request that may be in flight."""


@dataclass(frozen=True, eq=False)
class OpenSynthesis:
    """A synthesis file whose operator and inputs were found.

    Attributes:
        shard: this process's number, from 0, and how many there are.
        links: in folders of inputs, which lead elsewhere and are not followed.
    """

    path: Path
    file: Synthesis
    operator: Operator
    inputs: tuple[InputFile, ...]
    folder: Path
    shard: tuple[int, int]
    links: int = 0

    @property
    def samples(self) -> int:
        return self.file.samples or self.operator.rules.samples

    @property
    def target(self) -> int | None:
        return _share(self.file.target, self.shard)

    @property
    def most(self) -> int | None:
        return _share(self.file.candidates, self.shard)

    def counts(self) -> Counts:
        """Before the first record."""
        links = {"links that lead out of the inputs or nowhere": self.links} if self.links else {}
        return Counts(skipped=Counter(links))


def _share(total: int | None, shard: tuple[int, int]) -> int | None:
    number, of = shard
    return None if total is None else total * (number + 1) // of - total * number // of


@dataclass(frozen=True)
class Candidate:
    parent: str
    """The record's `id`, or FILE:LINE; FILE is relative to the synthesis file."""
    record: Mapping[str, Any]
    sample: int


@dataclass(frozen=True)
class Judged:
    candidate: Candidate
    outcome: Outcome
    replies: Mapping[str, str]
    """Step -> what the model wrote."""


@dataclass
class Counts:
    """Of a run so far."""

    candidates: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    """Records, not candidates."""
    steps: int = 0
    """Of the accepted rows' answers: lines that are not blank."""


@dataclass(frozen=True)
class Result:
    counts: Counts
    totals: Mapping[str, Totals]
    files: Files
    kept: bool = False


def open_synthesis(
    path: Path, shard: tuple[int, int] = (0, 1), overrides: Sequence[str] = ()
) -> OpenSynthesis:
    """Everything that can be found wrong before a request is sent. `overrides`: KEY=VALUE each.

    Raises:
        UserError: a mistake in the file, its operator or its inputs.
    """
    file = load_section(Synthesis, path, overrides)
    base = path.parent
    prompts = base / file.prompts if file.prompts else None
    operator = open_operator(file.operator, base, prompts, file.checks.judge)
    for role in operator.roles:
        if role not in file.models:
            raise UserError(f"{path}: models: the operator {file.operator} asks a {role}; add it")
    for role in file.models:
        if role not in operator.roles:
            asked = ", ".join(operator.roles)
            raise UserError(
                f"{path}: models.{role}: the operator asks {asked} alone; remove it"
                + (", or set checks.judge" if role == "judge" else "")
            )
    folder = Path(os.path.normpath(base / file.output))
    links: list[Path] = []
    inputs = tuple(find_inputs([base / one for one in file.inputs], on_link=links.append))
    return OpenSynthesis(path, file, operator, inputs, folder, shard, len(links))


async def synthesize(
    opened: OpenSynthesis,
    overwrite: bool = False,
    on_event: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Counts, Mapping[str, Totals]], None] = lambda counts, totals: None,
    environment: Mapping[str, str] = os.environ,
) -> Result:
    """Make rows until there are `target` of them, or no candidate is left; or find them made.

    Raises:
        UserError: an output that is in the way, a server that refuses.
    """
    files = Files.of(opened.folder, opened.shard)
    if is_made(opened, files, overwrite):
        return Result(Counts(), {}, files, kept=True)
    checks = open_checks(opened.file.checks, opened.path.parent)
    passed_over = opened.counts()
    if next(candidates_of(opened, passed_over), None) is None:
        told = ", ".join(f"{number:,} {why}" for why, number in passed_over.skipped.items())
        raise UserError(f"{opened.path}: no record to ask about ({told or 'inputs are empty'})")
    counts = opened.counts()
    files.folder.mkdir(parents=True, exist_ok=True)
    with Journal(files.journal) as journal, files.writing() as out:
        models = opened.file.models
        most = _AHEAD * sum(one.in_flight * len(one.endpoints) for one in models.values())

        def window() -> int:
            """As many as the target still takes, if as many as so far are rejected."""
            if opened.target is None:
                return most
            missing, accepted = opened.target - counts.accepted, counts.accepted + 1
            return min(most, -(-missing * (counts.candidates + 1) // accepted))

        async with Served(models, journal, environment, on_event=on_event) as served:
            verdicts = _verdicts(opened, checks, served, window, counts)
            async with aclosing(verdicts):
                async for one, row, reason, detail in verdicts:
                    counts.candidates += 1
                    if row and not reason:
                        counts.accepted += 1
                        counts.steps += row.steps
                        out.accept(row)
                    else:
                        counts.rejected[reason] += 1
                        out.reject(one, reason, detail)
                    on_progress(counts, served.totals())
                    if counts.accepted == opened.target:
                        break
            totals = served.totals()
        digest = journal.digest()
    write_manifest(opened, files, counts, totals, digest)
    return Result(counts, totals, files)


async def _verdicts(
    opened: OpenSynthesis,
    checks: OpenChecks,
    served: Served,
    window: Callable[[], int],
    counts: Counts,
) -> AsyncGenerator[tuple[Judged, Row | None, str, str], None]:
    """Candidates in order, each with its row, if it has one, and why it is rejected, in short and
    in detail; blank if it is accepted."""

    async def work(one: Candidate) -> Judged:
        return await _candidate(opened.operator, one, served)

    async with aclosing(in_order(candidates_of(opened, counts), work, window)) as judged:
        async for record in _by_record(judged, opened.samples):
            votes = [True] * len(record)
            if opened.file.checks.majority:
                votes = _votes(record)
            for one, voted in zip(record, votes, strict=True):
                row = Row.of(one, opened)
                if row is None:
                    yield one, None, one.outcome.reason, ""
                elif not voted:
                    yield one, row, "not the answer of most samples", ""
                else:
                    yield one, row, *checks.reject(row.fields, row.id)


async def _candidate(operator: Operator, one: Candidate, served: Served) -> Judged:
    """Run the operator's steps, each with what the models wrote before."""
    steps = candidate(operator, one.record, one.sample)
    replies: dict[str, str] = {}
    try:
        request = next(steps)
        while True:
            reply = await served.reply(request.role, list(request.messages), one.sample)
            if isinstance(reply, Refusal):
                return Judged(one, Outcome(None, reply.reason), replies)
            replies[request.step] = reply.text
            request = steps.send(Text(reply.text, reply.finish))
    except StopIteration as stop:
        return Judged(one, stop.value, replies)


def candidates_of(opened: OpenSynthesis, counts: Counts) -> Iterator[Candidate]:
    """This shard's, in order; what is passed over is counted."""
    names = opened.file.fields
    made = number = 0
    for file in opened.inputs:
        place = os.path.relpath(file.path, opened.path.parent)
        for item in read_input(file, ""):
            number += 1
            if (number - 1) % opened.shard[1] != opened.shard[0]:
                continue
            if isinstance(item, BadRecord):
                counts.skipped[item.reason] += 1
                continue
            record = dict(item.values) | {
                name: item.values.get(given) for name, given in names.items()
            }
            if missing := opened.operator.missing(record):
                counts.skipped[f"no {names.get(missing, missing)}"] += 1
                continue
            parent = str(record.get("id") or f"{place}:{item.record}")
            for sample in range(opened.samples):
                if made == opened.most:
                    return
                made += 1
                yield Candidate(parent, record, sample)


async def _by_record(judged: AsyncIterator[Judged], samples: int) -> AsyncIterator[list[Judged]]:
    """Each record's `samples`; the last record may have fewer, where `candidates` ends."""
    together: list[Judged] = []
    async for one in judged:
        together.append(one)
        if len(together) == samples:
            yield together
            together = []
    if together:
        yield together


def _votes(record: Sequence[Judged]) -> list[bool]:
    """Whether each has the answer of most; those that were rejected have no vote."""
    voters = [i for i, one in enumerate(record) if one.outcome.row is not None]
    kept = majority([record[i].outcome.answer for i in voters])
    votes = dict(zip(voters, kept, strict=True))
    return [votes.get(i, False) for i in range(len(record))]
