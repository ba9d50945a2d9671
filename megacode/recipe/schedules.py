"""Numbers that move with the step: mixture weights, batch sizes, learning rates.

Everything is plain IEEE arithmetic on numbers (no library cosine where a mixture depends on it), so
that two machines agree to the last bit. `steps` are int64 arrays of steps of a phase, 0 for its
first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacode.recipe.schema import BatchRamp, LearningRate, Schedule

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]


def half_cosine(x: Floats) -> Floats:
    """(1 - cos(pi x)) / 2 for x in [0, 1], from 0 to 1; error below 1e-15.

    A Taylor series of nothing but additions and multiplications: library cosines differ in the last
    bit between processors, and every rank must agree on how many samples of a source a step takes.
    """
    angle = math.pi * (x - 0.5)
    square = angle * angle
    series = np.full_like(angle, _SINE[-1])
    for factor in reversed(_SINE[:-1]):
        series = series * square + factor
    return np.clip((1.0 + angle * series) / 2.0, 0.0, 1.0)


def schedule_values(schedule: float | Schedule, steps: Ints, over: int) -> Floats:
    """Value of a weight at each of `steps`, float64.

    The first of the `over` steps has `start`, the last of them `end` (so a rise and a fall of one
    length take the same total), and every later step keeps the last value.
    """
    if not isinstance(schedule, Schedule):
        return np.full(steps.shape, float(schedule))
    if schedule.shape == "stepwise":
        values = np.asarray(schedule.values, dtype=np.float64)
        return values[np.minimum(steps * len(values) // over, len(values) - 1)]
    assert schedule.start is not None and schedule.end is not None
    x = np.minimum(steps / (over - 1), 1.0) if over > 1 else np.ones(steps.shape)
    x = half_cosine(x) if schedule.shape == "cosine" else x
    # In this form both ends come out exactly.
    return (1.0 - x) * schedule.start + x * schedule.end


@dataclass(frozen=True)
class Weights:
    """Shares of a phase's streams before normalisation: ratio of the stream's group times its
    weight within the group.

    A mixture of `sources` has one group per stream, with the stream's weight as ratio; a mixture of
    `domains` has one group per domain.

    Attributes:
        ratios: one per group.
        inner: per stream (group, weight within the group).
        steps: the length of schedules that have no `over`: the phase's.
        first: step of the schedules at the phase's first step; not 0 for a piece of a longer phase.
        worth: per stream, what a sample counts where shares are not of samples; None: 1 each.
    """

    ratios: tuple[float | Schedule, ...]
    inner: tuple[tuple[int, float | Schedule], ...]
    steps: int
    first: int = 0
    worth: tuple[float, ...] | None = None

    @property
    def settled(self) -> int:
        """First step of the phase from which the weights no longer move."""
        moving = [w for w in (*self.ratios, *(w for _, w in self.inner)) if isinstance(w, Schedule)]
        return max(
            (max((schedule.over or self.steps) - self.first, 0) for schedule in moving), default=0
        )

    def at(self, steps: Ints) -> Floats:
        """float64 [len(steps), streams], not normalised."""

        def values(weight: float | Schedule) -> Floats:
            over = (weight.over or self.steps) if isinstance(weight, Schedule) else 1
            return schedule_values(weight, steps + self.first, over)

        ratios = [values(ratio) for ratio in self.ratios]
        within = [values(weight) for _, weight in self.inner]
        sums = [np.zeros(steps.shape) for _ in ratios]
        for (group, _), value in zip(self.inner, within, strict=True):
            sums[group] = sums[group] + value
        out = np.empty((len(steps), len(within)))
        for column, ((group, _), value) in enumerate(zip(self.inner, within, strict=True)):
            total = sums[group]
            out[:, column] = ratios[group] * np.divide(
                value, total, out=np.zeros(steps.shape), where=total > 0
            )
        return out if self.worth is None else out / np.array(self.worth)


@dataclass(frozen=True, eq=False)
class BatchSizes:
    """Batch size of every step of a phase: stairs that go up, the last one for ever.

    Attributes:
        starts: int64 [stairs], first step of each stair; the first is 0.
        sizes: int64 [stairs], sequences in each step of the stair.
        totals: int64 [stairs], sequences in all steps before the stair.
    """

    starts: Ints
    sizes: Ints
    totals: Ints

    @staticmethod
    def of(batch_size: int | BatchRamp) -> BatchSizes:
        """Stairs of a recipe's `batch_size`. A ramp's `end` is reached at step `over`."""
        if isinstance(batch_size, BatchRamp):
            stairs = (batch_size.end - batch_size.start) // batch_size.increment
            number = np.arange(stairs + 1, dtype=np.int64)
            starts = -(-number * batch_size.over // stairs)
            sizes = batch_size.start + number * batch_size.increment
            # Where there are more stairs than steps, several begin at one step and the highest of
            # them holds.
            last = np.append(starts[1:] != starts[:-1], True)
            starts, sizes = starts[last], sizes[last]
        else:
            starts, sizes = np.zeros(1, dtype=np.int64), np.array([batch_size], dtype=np.int64)
        return BatchSizes(starts, sizes, _totals(starts, sizes))

    def after(self, first: int) -> BatchSizes:
        """The same stairs, with step `first` as step 0."""
        stair = int(np.searchsorted(self.starts, first, side="right")) - 1
        starts, sizes = np.maximum(self.starts[stair:] - first, 0), self.sizes[stair:]
        return BatchSizes(starts, sizes, _totals(starts, sizes))

    def at(self, steps: Ints) -> Ints:
        """Sequences in each of `steps`."""
        return self.sizes[np.searchsorted(self.starts, steps, side="right") - 1]

    def before(self, steps: Ints) -> Ints:
        """Sequences in all steps before each of `steps`."""
        stair = np.searchsorted(self.starts, steps, side="right") - 1
        return self.totals[stair] + (steps - self.starts[stair]) * self.sizes[stair]

    def steps_for(self, samples: Ints) -> Ints:
        """The fewest steps that hold at least `samples` sequences."""
        stair = np.maximum(np.searchsorted(self.totals, samples, side="left") - 1, 0)
        return self.starts[stair] - (self.totals[stair] - samples) // self.sizes[stair]


def _totals(starts: Ints, sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(starts) * sizes[:-1])])


def learning_rate(rate: LearningRate, step: int, steps: int) -> float:
    """Rate at `step` (0 for the phase's first) of a phase of `steps`, as `LearningRate` says.

    `linear` and `cosine` go from peak to final; `wsd` is warm-up, stable, decay (arXiv 2404.06395);
    `inverse-sqrt` never goes below `final`.
    """
    if step < rate.warmup:
        return rate.start + (rate.peak - rate.start) * step / rate.warmup
    if rate.schedule == "constant":
        return rate.peak
    decay = rate.decay_steps or max(steps - rate.warmup, 1)
    after = step - rate.warmup
    if after >= decay:
        return rate.final
    if rate.schedule == "inverse-sqrt":
        warm = max(rate.warmup, 1)
        return max(rate.final, rate.peak * math.sqrt(warm / max(step, warm)))
    x, shape = after / decay, str(rate.schedule)
    if rate.schedule == "wsd":
        length = decay * rate.wsd_decay
        if after <= decay - length:
            return rate.peak
        x, shape = (after - (decay - length)) / length, rate.wsd_shape
    drop = {"linear": x, "cosine": (1.0 - math.cos(math.pi * x)) / 2.0, "sqrt": math.sqrt(x)}[shape]
    return rate.peak - (rate.peak - rate.final) * drop
