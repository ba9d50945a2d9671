"""Recipe -> Plan: every step of the run before it starts.

Steps, batch sizes, rates, and for every stream of every phase how many samples it gives, where its cursor stands and
how many epochs that makes: exact, because all of it is a function of the recipe and of how many tokens each source has.
`step` is always the run's step, 0 for its first update.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from megacode.errors import UserError
from megacode.plan.quota import ONE, Quota, QuotaFrom, phase_quota
from megacode.plan.windows import Windows, shuffle_units, windows_of
from megacode.recipe.compose import did_you_mean
from megacode.recipe.mixtures import Entry, mixture_entries, mixture_weights
from megacode.recipe.schedules import BatchSizes, Floats, Ints, learning_rate
from megacode.recipe.schema import FimLevel, LearningRate, Packing, Phase, Recipe, Schedule

StreamKey = tuple[str, float, float]


@dataclass(frozen=True)
class StreamPlan:
    """One stream within one phase. Positions and sizes are in tokens of the source.

    With `packing: best_fit` a window is a pack: `window` is the sequence length, `windows` counts packs, and tokens are
    those of whole sequences, padding included.

    Attributes:
        low, high: the part of the source, 0 and 1 for all of it.
        window: shuffle unit, a multiple of the phase's sequence length.
        first_window, windows: of the part.
        cursor: ordered position at the phase's start (multiple of the sequence length).
        samples: that the phase takes.
        sequence_length: the phase's.
        tokens_before: read from this stream in earlier phases.
        estimated: `windows` is worked out from the declared `tokens`, as if packs were full: the data is not there.
    """

    source: str
    domain: str
    low: float
    high: float
    fim_rate: float
    window: int
    first_window: int
    windows: int
    cursor: int
    samples: int
    sequence_length: int
    tokens_before: int = 0
    fim_level: FimLevel = "context"
    packing: Packing = "concatenate"
    estimated: bool = False

    @property
    def label(self) -> str:
        """`python`, or `python[0.0-0.1]` for a part."""
        return (
            self.source
            if (self.low, self.high) == (0.0, 1.0)
            else f"{self.source}[{self.low}-{self.high}]"
        )

    @property
    def epoch_tokens(self) -> int:
        """Tokens in one pass over the stream."""
        return self.windows * self.window

    @property
    def tokens(self) -> int:
        """Tokens that this phase takes."""
        return self.samples * self.sequence_length

    @property
    def epochs(self) -> float:
        """Passes over the stream in this phase."""
        return self.tokens / self.epoch_tokens

    @property
    def epochs_after(self) -> float:
        """Passes over the stream from the run's start to the end of this phase."""
        return (self.tokens_before + self.tokens) / self.epoch_tokens

    @property
    def cursor_after(self) -> int:
        """Ordered position at the phase's end."""
        return self.cursor + self.tokens


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
    quota: Quota | QuotaFrom = field(compare=False)
    rate: LearningRate
    rate_place: tuple[int, int]
    """The rate's step at the phase's first step, and how many steps it is made for."""

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def samples(self) -> int:
        return self.samples_before(self.first_step + self.steps)

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
        """int64 [streams]: samples taken in this phase before `step`; `step` may be one past the phase's last."""
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


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    recipe: Recipe
    phases: tuple[PhasePlan, ...]
    token_counts: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Tokens of every source that a phase reads."""

    @property
    def total_steps(self) -> int:
        return self.phases[-1].first_step + self.phases[-1].steps

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

    def batch_size(self, step: int) -> int:
        return self.phase_at(step).batch_size(step)

    def learning_rate(self, step: int) -> float:
        return self.phase_at(step).learning_rate(step)

    def samples_before(self, step: int) -> int:
        """Sequences in all steps before `step`."""
        return sum(
            p.samples_before(min(step, p.first_step + p.steps))
            for p in self.phases
            if p.first_step < step
        )

    def tokens_before(self, step: int) -> int:
        """Tokens in all steps before `step`."""
        return sum(
            p.samples_before(min(step, p.first_step + p.steps)) * p.sequence_length
            for p in self.phases
            if p.first_step < step
        )

    def phase_ends(self) -> tuple[int, ...]:
        """Finished steps at the end of each phase."""
        return tuple(phase.first_step + phase.steps for phase in self.phases)

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
        """Finished steps after which the run saves: the cadence, the ends of phases (`keep_phase_ends`), the end of the
        run.

        `checkpoints.every` counts the run's steps, a phase's own `checkpoint_every` counts from the phase's start.
        """
        steps = {self.total_steps}
        if self.recipe.checkpoints.keep_phase_ends:
            steps.update(self.phase_ends())
        for given, phase in zip(self.recipe.phases, self.phases, strict=True):
            end = phase.first_step + phase.steps
            if given.checkpoint_every:
                begins = phase.first_step - given.begun
                saves = range(begins + given.checkpoint_every, end + 1, given.checkpoint_every)
                steps.update(step for step in saves if step > phase.first_step)
            elif every := self.recipe.checkpoints.every:
                steps.update(range((phase.first_step // every + 1) * every, end + 1, every))
        return tuple(sorted(steps))

    def kept_checkpoints(self) -> frozenset[int]:
        """Those of `checkpoints()` that are never removed."""
        settings = self.recipe.checkpoints
        ends = set(self.phase_ends()) if settings.keep_phase_ends else set()
        every = settings.keep_every
        return frozenset(s for s in self.checkpoints() if s in ends or (every and s % every == 0))


_MOST_STEPS = 50_000_000
"""Of a phase: hundreds of times the longest runs there are; some µs each to plan."""


def make_plan(
    recipe: Recipe,
    token_counts: Mapping[str, int],
    path: Path | None = None,
    pack_counts: Mapping[tuple[str, int], int] | None = None,
) -> Plan:
    """The plan of a checked recipe.

    Args:
        token_counts: tokens of every source that a phase reads.
        path: of the recipe file, for messages.
        pack_counts: packs of the sources with `packing: best_fit`, by (source, sequence length); what is missing is
            estimated from `token_counts`.

    Raises:
        UserError: a phase of more steps than anybody takes; else, all of them at once and a sentence each, a source too
            short for its window or subset, a window that is no multiple of a sequence length, a source read more often
            than its `max_epochs`.
    """
    where = f"{path}: " if path else ""
    shuffle = shuffle_units(recipe, where)
    history: dict[StreamKey, StreamPlan] = {}
    phases: list[PhasePlan] = []
    problems: list[str] = []
    first_step = 0
    for index, phase in enumerate(recipe.phases):
        batch, batch_first = BatchSizes.of(phase.batch_size), phase.placed("batch_size", 0)[0]
        steps = phase_steps(phase, batch.after(batch_first))
        if steps > _MOST_STEPS:
            raise UserError(
                f"{where}phases.{phase.name}: has {steps:,} steps, and {_MOST_STEPS:,} is the most; correct its `steps` or "
                "`tokens`, or raise `batch_size`"
            )
        entries = mixture_entries(recipe, phase)
        mixture_first, mixture_steps = phase.placed("mixture", steps)
        weights = mixture_weights(phase, entries, token_counts, mixture_steps)
        quota = phase_quota(weights, batch, mixture_first, batch_first)
        streams = []
        for column, (entry, samples) in enumerate(
            zip(entries, quota.before(steps).tolist(), strict=True)
        ):
            try:
                windows = windows_of(recipe, entry, phase, token_counts, pack_counts or {}, shuffle)
                stream = _stream(entry, phase, samples, windows, history)
            except UserError as error:
                problems.append(where + str(error))
                continue
            cap = entry.given.max_epochs
            if cap is not None and stream.tokens_before + stream.tokens > cap * stream.epoch_tokens:
                problems.append(where + _too_many_epochs(entry, stream, quota, column, steps))
            streams.append(stream)
        phases.append(
            PhasePlan(
                index=index,
                name=phase.name,
                first_step=first_step,
                steps=steps,
                sequence_length=phase.sequence_length,
                reset_at_eod=recipe.resets(phase),
                fresh_optimizer=phase.optimizer_state == "fresh",
                streams=tuple(streams),
                quota=quota,
                rate=phase.learning_rate,
                rate_place=phase.placed("learning_rate", steps),
            )
        )
        first_step += steps
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return Plan(recipe, tuple(phases), dict(token_counts))


def _stream(
    entry: Entry, phase: Phase, samples: int, windows: Windows, history: dict[StreamKey, StreamPlan]
) -> StreamPlan:
    """A stream of a phase, going on from what `history` has of it; takes its place there.

    UserError if it would go on in packs of another length, which share no order.
    """
    low, high = entry.given.subset_range
    earlier = history.get((entry.source, low, high))
    length = phase.sequence_length
    if (
        windows.packing == "best_fit"
        and earlier
        and earlier.sequence_length != length
        and not entry.restart
    ):
        raise UserError(
            f"{entry.key}: source {entry.source} is packed (best_fit) for {length:,} tokens here and for "
            f"{earlier.sequence_length:,} before, and the two share no order to go on in; set `cursor: restart` here, which "
            "reads it from its start again, give this phase a `subset` of it that was not read, or set "
            f"sources.{entry.source}.packing: concatenate"
        )
    stopped_at = 0 if earlier is None or entry.restart else earlier.cursor_after
    stream = StreamPlan(
        source=entry.source,
        domain=entry.domain,
        low=low,
        high=high,
        fim_rate=entry.fim_rate,
        window=windows.size,
        first_window=windows.first,
        windows=windows.count,
        cursor=-(-stopped_at // length) * length,
        samples=samples,
        sequence_length=length,
        tokens_before=earlier.tokens_before + earlier.tokens if earlier else 0,
        fim_level=entry.fim_level,
        packing=windows.packing,
        estimated=windows.estimated,
    )
    history[(entry.source, low, high)] = stream
    return stream


def phase_steps(phase: Phase, batch: BatchSizes) -> int:
    """`steps`, or the fewest whole steps that see `tokens`."""
    if phase.steps is not None:
        return phase.steps
    assert phase.tokens is not None
    return int(batch.steps_for(np.array([-(-phase.tokens // phase.sequence_length)]))[0])


def _too_many_epochs(
    entry: Entry, stream: StreamPlan, quota: Quota | QuotaFrom, index: int, steps: int
) -> str:
    cap = entry.given.max_epochs
    assert cap is not None
    allowed = (
        int(Fraction(str(cap)) * stream.epoch_tokens - stream.tokens_before)
        // stream.sequence_length
    )
    fits, too_many = 0, steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (
            (middle, too_many) if quota.before(middle)[index] <= allowed else (fits, middle)
        )
    remedies = [
        f"at most {fits:,} steps of this phase fit" if fits else "no step of this phase fits"
    ]
    weight, total = entry.given.weight, int(quota.batch.before(np.array([steps]))[0])
    constant = (
        quota.weights.settled == 0 and weight is not None and not isinstance(weight, Schedule)
    )
    if constant and entry.key.split(".mixture.")[1].startswith("sources.") and 0 < allowed < total:
        others = float(quota.weights.at(np.zeros(1, np.int64))[0].sum()) - float(weight)  # type: ignore[arg-type]
        share = (allowed - 1) / total
        if others > 0 and share > 0:
            digits = 3 - math.floor(math.log10(share * others / (1 - share)))
            best = math.floor(share * others / (1 - share) * 10**digits) / 10**digits
            remedies.append(f"or a weight of at most {best:g}")
    return (
        f"{entry.key}.max_epochs: source {stream.label} would be read {stream.epochs_after:.4g} times by the end of "
        f"this phase, more than {cap:g}; {', '.join(remedies)}, or raise max_epochs"
    )
