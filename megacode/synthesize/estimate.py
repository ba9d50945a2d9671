"""What a synthesis asks for, and what it costs at most, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from megacode.synthesize.journal import Journal
from megacode.synthesize.make import Counts, OpenSynthesis, candidates_of
from megacode.synthesize.output import Files
from megacode.synthesize.wire import CHARACTERS

LONGEST = 512
"""Tokens of a reply where `max_tokens` is not given."""
_LOOKED_AT = 200
"""Candidates whose records are measured."""


@dataclass(frozen=True)
class RoleEstimate:
    """Upper bounds of one model. `minutes`: at its limits a minute; 0 without limits."""

    requests: int
    prompt: int
    completion: int
    price: float
    minutes: float


@dataclass(frozen=True)
class Estimate:
    """`known`: replies that the journal has."""

    records: int
    candidates: int
    roles: dict[str, RoleEstimate]
    known: int


def estimate(opened: OpenSynthesis) -> Estimate:
    """Reads the inputs whole, sends nothing."""
    total = records = size = 0
    for one in candidates_of(opened, Counts()):
        total += 1
        records += int(one.sample == 0)
        if total <= _LOOKED_AT:
            size += sum(len(str(one.record[name])) for name in opened.operator.rules.needs)
    record = size / max(min(total, _LOOKED_AT), 1)
    roles = {}
    for role, model in opened.file.models.items():
        longest = int(model.parameters.get("max_tokens", LONGEST))
        prompt, steps, before = 0.0, 0, 0
        for step in opened.operator.rules.ask:
            if step.of == role:
                steps += 1
                prompt += (len(step.prompt) + len(step.system) + record) / CHARACTERS + before
            before += int(opened.file.models[step.of].parameters.get("max_tokens", LONGEST))
        tokens_in, tokens_out = int(prompt * total), steps * longest * total
        price = (tokens_in * model.price.input + tokens_out * model.price.output) / 1e6
        each = len(model.endpoints)
        limits = (
            (steps * total, model.requests_per_minute),
            (tokens_in + tokens_out, model.tokens_per_minute),
        )
        minutes = max(number / (limit * each) if limit else 0.0 for number, limit in limits)
        roles[role] = RoleEstimate(steps * total, tokens_in, tokens_out, price, minutes)
    known, path = 0, Files.of(opened.folder, opened.shard).journal
    if path.exists():
        with Journal(path) as journal:
            known = len(journal)
    return Estimate(records, total, roles, known)
