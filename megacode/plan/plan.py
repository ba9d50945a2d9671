"""Recipe -> Plan: every step of the run before it starts.

Steps, batch sizes, rates, and for every stream of every phase how many samples it gives, where its
cursor stands and how many epochs that makes. All of it is exact: a function of the recipe and of
how many tokens each source has. `step` is always the run's step, 0 for its first update.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from megacode.errors import UserError
from megacode.plan.bounds import sample_bounds
from megacode.plan.quota import ONE, BlockQuota, Quota, phase_quota
from megacode.plan.streams import (
    SourceSizes,
    StreamPlan,
    check_epochs,
    clipped_weights,
    epoch_steps,
    plan_stream,
    window_sizes,
)
from megacode.recipe.compose import did_you_mean
from megacode.recipe.mixtures import mixture_entries, mixture_weights
from megacode.recipe.objectives import StepObjective, objective_at
from megacode.recipe.online import decides
from megacode.recipe.schedules import BatchSizes, Floats, Ints, learning_rate
from megacode.recipe.schema import LearningRate, Objective, Phase, Recipe

_MOST_STEPS = 50_000_000
"""Upper limit for the steps of a phase; each takes some µs to plan."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase: its steps, streams, batch sizes and rates."""

    index: int
    name: str
    first_step: int
    steps: int
    sequence_length: int
    reset_at_eod: bool
    fresh_optimizer: bool
    streams: tuple[StreamPlan, ...]
    quota: Quota = field(compare=False)
    rate: LearningRate
    rate_place: tuple[int, int]
    """The rate's step at the phase's first step, and how many steps it is made for."""
    objective: Objective | None = None
    asked: tuple[int, ...] | None = None
    """Samples of each stream that the recipe's weights would take, where `max_epochs` clips."""

    @property
    def end(self) -> int:
        """Finished steps at its end: the first step after it."""
        return self.first_step + self.steps

    @property
    def last_step(self) -> int:
        return self.end - 1

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """Of the streams; None if all are 1."""
        weights = tuple(stream.loss_weight for stream in self.streams)
        return None if set(weights) == {1.0} else weights

    @property
    def samples(self) -> int:
        return self.samples_before(self.end)

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length

    def samples_before(self, step: int) -> int:
        """Sequences in this phase's steps before `step`."""
        return int(self.quota.batch.before(np.array([step - self.first_step]))[0])

    def batch_size(self, step: int) -> int:
        """Sequences in a step, over all ranks."""
        return int(self.quota.batch.at(np.array([step - self.first_step]))[0])

    def counts_before(self, step: int) -> Ints:
        """int64 [streams]: samples taken in this phase before `step`; `step` may be one past the
        phase's last."""
        return self.quota.before(step - self.first_step)

    def counts(self, step: int) -> Ints:
        """int64 [streams]: samples of each stream in `step`; their sum is the batch size."""
        return self.counts_before(step + 1) - self.counts_before(step)

    def counts_range(self, start: int, stop: int) -> Ints:
        """int64 [stop - start + 1, streams]: `counts_before` of start ... stop."""
        return self.quota.range(start - self.first_step, stop - self.first_step)

    def weights(self, step: int) -> Floats:
        """float64 [streams]: normalised weights in `step`; their sum is 1 exactly."""
        return self.weights_at(np.array([step]))[0]

    def weights_at(self, steps: Ints) -> Floats:
        """float64 [len(steps), streams]."""
        return self.quota.shares(steps - self.first_step) / ONE

    def learning_rate(self, step: int) -> float:
        first, steps = self.rate_place
        return learning_rate(self.rate, step - self.first_step + first, steps)

    def objective_at(self, step: int) -> StepObjective | None:
        """None: the next-token loss alone. Schedules run as the learning rate's does."""
        if self.objective is None:
            return None
        first, steps = self.rate_place
        return objective_at(self.objective, step - self.first_step + first, steps)


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    recipe: Recipe
    phases: tuple[PhasePlan, ...]
    token_counts: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Tokens of every source that a phase reads."""
    again: Callable[[Recipe], Plan] = field(kw_only=True, compare=False, repr=False)
    """The plan of a changed recipe over the same data."""

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    @property
    def total_samples(self) -> int:
        return sum(phase.samples for phase in self.phases)

    @property
    def total_tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    def phase_at(self, step: int) -> PhasePlan:
        """The phase of a step; steps past the end belong to the last phase."""
        starts = [phase.first_step for phase in self.phases]
        return self.phases[max(bisect.bisect_right(starts, step) - 1, 0)]

    def learning_rate(self, step: int) -> float:
        return self.phase_at(step).learning_rate(step)

    def tokens_before(self, step: int) -> int:
        """Tokens in all steps before `step`."""
        past = (phase for phase in self.phases if phase.first_step < step)
        return sum(p.samples_before(min(step, p.end)) * p.sequence_length for p in past)

    def phase_ends(self) -> tuple[int, ...]:
        """Finished steps at the end of each phase."""
        return tuple(phase.end for phase in self.phases)

    def phase_end(self, name: str | None) -> int:
        """Finished steps at the end of the phase of that name; None: at the end of the run.

        Raises:
            UserError: there is no such phase.
        """
        if name is None:
            return self.total_steps
        names = [phase.name for phase in self.phases]
        if name not in names:
            raise UserError(
                f"--until-phase: the recipe has no phase {name!r}{did_you_mean(name, names)}"
            )
        return self.phase_ends()[names.index(name)]

    def checkpoints(self) -> tuple[int, ...]:
        """Finished steps after which the run saves: the cadence, the ends of phases
        (`keep_phase_ends`), the end of the run.

        `checkpoints.every` counts the run's steps, a phase's own `checkpoint_every` counts from the
        phase's start.
        """
        steps = {self.total_steps}
        if self.recipe.checkpoints.keep_phase_ends:
            steps.update(self.phase_ends())
        for given, phase in zip(self.recipe.phases, self.phases, strict=True):
            begins, every = 0, self.recipe.checkpoints.every
            if given.checkpoint_every:
                begins, every = phase.first_step - given.begun, given.checkpoint_every
            if every:
                saved = (phase.first_step - begins) // every
                steps.update(range(begins + (saved + 1) * every, phase.end + 1, every))
        return tuple(sorted(steps))

    def kept_checkpoints(self) -> frozenset[int]:
        """Those of `checkpoints()` that are never removed."""
        settings = self.recipe.checkpoints
        ends = set(self.phase_ends()) if settings.keep_phase_ends else set()
        every = settings.keep_every
        return frozenset(s for s in self.checkpoints() if s in ends or (every and s % every == 0))


def make_plan(
    recipe: Recipe,
    token_counts: Mapping[str, int],
    path: Path | None = None,
    pack_counts: Mapping[tuple[str, int], int] | None = None,
    trained_counts: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a checked recipe.

    Args:
        token_counts: tokens of every source that a phase reads.
        path: of the recipe file, for messages.
        pack_counts: packs of the packed sources, by (source, sequence length); what is missing is
            estimated from `token_counts`.
        trained_counts: tokens with a loss in those of conversations.

    Raises:
        UserError: a phase has more than `_MOST_STEPS` steps; a window is no multiple of a sequence
            length; else all problems of streams, a line each: a source too short for its window or
            subset, or read more often than its `max_epochs`.
    """
    where = f"{path}: " if path else ""
    windows = window_sizes(recipe, where)
    sizes = SourceSizes(token_counts, pack_counts or {}, windows, trained_counts or {})
    read: dict[tuple[str, float, float], StreamPlan] = {}  # what earlier phases read of a stream
    phases: list[PhasePlan] = []
    problems: list[str] = []
    for index, phase in enumerate(recipe.phases):
        batch, batch_first = BatchSizes.of(phase.batch_size), phase.placed("batch_size", 0)[0]
        entries = mixture_entries(recipe, phase)
        steps = phase_steps(phase, batch.after(batch_first))
        mixture_first, mixture_steps = phase.placed("mixture", steps or 0)
        worth = partial(sizes.trained_per_sequence, length=phase.sequence_length)
        weights = mixture_weights(phase, entries, token_counts, mixture_steps, worth)
        online = phase.mixture.online
        every = online.every if online else None
        quota = phase_quota(weights, batch, mixture_first, batch_first, every)
        if steps is None:
            try:
                steps = epoch_steps(recipe, phase, entries, sizes, quota)
            except UserError as error:
                raise UserError(f"{where}{error}") from None
        if steps > _MOST_STEPS:
            raise UserError(
                f"{where}phases.{phase.name}: has {steps:,} steps, and {_MOST_STEPS:,} is the "
                "most; correct its `steps`, `tokens` or `epochs`, or raise `batch_size`"
            )
        asked = None
        if phase.mixture.over_epochs == "clip":
            try:
                clipped = clipped_weights(recipe, phase, entries, sizes, quota, steps, read)
            except UserError as error:
                raise UserError(f"{where}{error}") from None
            if clipped:
                asked = quota.before(steps)
                quota = phase_quota(clipped, batch, 0, batch_first)
        streams = []
        bounds = None
        if decides(phase) and isinstance(quota, BlockQuota):
            bounds = sample_bounds(phase, weights, quota, steps)
        for column, samples in enumerate(quota.before(steps).tolist()):
            entry = entries[column]
            key = (entry.source, *entry.given.subset_range)
            try:
                stream = plan_stream(
                    recipe, entry, phase.sequence_length, samples, sizes, read.get(key)
                )
            except UserError as error:
                problems.append(f"{where}{error}")
                continue
            if bounds:
                stream = replace(stream, bounds=bounds[column])
            if problem := check_epochs(entry, stream, quota, column, steps):
                problems.append(where + problem)
            read[key] = stream
            streams.append(stream)
        phases.append(
            PhasePlan(
                index=index,
                name=phase.name,
                first_step=phases[-1].end if phases else 0,
                steps=steps,
                sequence_length=phase.sequence_length,
                reset_at_eod=recipe.resets(phase),
                fresh_optimizer=phase.optimizer_state == "fresh",
                objective=phase.objective,
                streams=tuple(streams),
                quota=quota,
                rate=phase.learning_rate,
                rate_place=phase.placed("learning_rate", steps),
                asked=None if asked is None else tuple(asked.tolist()),
            )
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    again = partial(
        make_plan,
        token_counts=token_counts,
        path=path,
        pack_counts=pack_counts,
        trained_counts=trained_counts,
    )
    return Plan(recipe, tuple(phases), dict(token_counts), again=again)


def phase_steps(phase: Phase, batch: BatchSizes) -> int | None:
    """`steps`, or the fewest whole steps that see `tokens`; None if `epochs` say how long it is."""
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is None:
        return None
    return int(batch.steps_for(np.array([-(-phase.tokens // phase.sequence_length)]))[0])
