"""(plan, step) -> which samples: a pure function. Nothing is drawn or saved.

How step t's batch comes about, for a batch of B sequences of S tokens:

1. The plan says how many samples each stream gives (their sum is B) and how many it gave before.
2. Sample k of a stream stands at ordered position p = cursor + k S. The stream is M windows of W
   tokens, so its epoch is p // (M W), and the slot in that epoch is (p mod M W) // W. The slot's
   window is first_window + permutation(slot), keyed by (seed, stream, epoch); with `order: file`
   first_window + slot. The sample is the S + 1 tokens from p mod W of that window. So an epoch
   holds every sample exactly once. Where a source is packed a window is a pack (W = S) and the
   sample is what is in it.
3. A permutation keyed by (seed, t) orders the B samples, so that every micro-batch of every rank
   sees the mixture.

A rank asks for its own positions only. Nothing above depends on ranks, on the run's length or on
later phases, so none of them can change what a step reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megacode.data.permute import make_key, permute, uniform_bits
from megacode.data.source import DocumentPart, TokenSource, open_sources
from megacode.errors import UserError
from megacode.plan.plan import PhasePlan, Plan
from megacode.plan.streams import StreamPlan

Int64s = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StepSamples:
    """Samples of one step, all of them or some: arrays of equal length n.

    Attributes:
        step: the run's step, 0 for the first.
        phase: its phase; `phase.sequence_length` + 1 tokens are read for each sample.
        positions: int64 [n], places in the step's batch.
        stream: int32 [n], index into `phase.streams`.
        epoch: int64 [n], passes over the stream before this one.
        start: int64 [n], number of the first token in the source; if it is packed the number
            of the pack times the sequence length.
    """

    step: int
    phase: PhasePlan
    positions: Int64s
    stream: NDArray[np.int32]
    epoch: Int64s
    start: Int64s

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, part: slice | Int64s) -> StepSamples:
        """The samples at `part` of these arrays."""
        return StepSamples(
            self.step,
            self.phase,
            self.positions[part],
            self.stream[part],
            self.epoch[part],
            self.start[part],
        )


@dataclass(frozen=True)
class SampleOrigin:
    """Where one sample of a batch comes from: `parts` of documents, in order, make its `tokens`.

    `start`: as in `StepSamples`.
    """

    position: int
    stream: StreamPlan
    epoch: int
    start: int
    tokens: int
    parts: tuple[DocumentPart, ...]


class _Streams:
    """A phase's streams as arrays, [streams] each."""

    def __init__(self, phase: PhasePlan, seed: int) -> None:
        self.keys = np.array([stream_key(seed, "order", s) for s in phase.streams], dtype=np.uint64)
        self.cursor = np.array([s.cursor for s in phase.streams], dtype=np.int64)
        self.window = np.array([s.window for s in phase.streams], dtype=np.int64)
        self.windows = np.array([s.windows for s in phase.streams], dtype=np.int64)
        self.first_window = np.array([s.first_window for s in phase.streams], dtype=np.int64)
        self.in_file_order = np.array([s.order == "file" for s in phase.streams])


class OpenMixture:
    """The data order of a plan over open sources (by name).

    UserError if a source is shorter than the plan says.
    """

    def __init__(self, plan: Plan, sources: Mapping[str, TokenSource]) -> None:
        self.plan = plan
        self.sources = sources
        self._phases = [_Streams(phase, plan.recipe.resolved_data_seed) for phase in plan.phases]
        self._step_key = make_key(plan.recipe.resolved_data_seed, "step")
        for phase in plan.phases:
            for stream in phase.streams:
                _check(stream, sources[stream.source])

    def step(self, step: int, positions: ArrayLike | None = None) -> StepSamples:
        """The samples at `positions` (default: all) of a step's batch, in O(streams + positions).

        IndexError for a step outside the run or a position outside the batch.
        """
        if not 0 <= step < self.plan.total_steps:
            raise IndexError(f"step {step} is outside the run's {self.plan.total_steps} steps")
        phase = self.plan.phase_at(step)
        counts = phase.counts(step)
        size = int(counts.sum())
        places = np.asarray(np.arange(size) if positions is None else positions, dtype=np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < size):
            raise IndexError(f"positions outside the step's batch of {size} were asked for")
        # Place -> index in the batch sorted by stream -> (stream, how many-th of it in this step).
        index = permute(places, size, uniform_bits(self._step_key, step)).astype(np.int64)
        ends = np.cumsum(counts)
        stream = np.searchsorted(ends, index, side="right")
        within = index - (ends - counts)[stream]

        arrays = self._phases[phase.index]
        window, windows = arrays.window[stream], arrays.windows[stream]
        taken = phase.counts_before(step)[stream] + within
        ordered = arrays.cursor[stream] + taken * phase.sequence_length
        epoch, rest = np.divmod(ordered, windows * window)
        slot, inside = np.divmod(rest, window)
        shuffled = permute(slot, windows, uniform_bits(arrays.keys[stream], epoch)).astype(np.int64)
        shuffled = np.where(arrays.in_file_order[stream], slot, shuffled)
        start = (arrays.first_window[stream] + shuffled) * window + inside
        return StepSamples(step, phase, places, stream.astype(np.int32), epoch, start)

    def describe(self, step: int, positions: ArrayLike | None = None) -> list[SampleOrigin]:
        """Which documents are in a step: one entry for each of `positions` (default: all)."""
        samples = self.step(step, positions)
        origins = []
        for row, position in enumerate(samples.positions.tolist()):
            stream = samples.phase.streams[int(samples.stream[row])]
            epoch, start = int(samples.epoch[row]), int(samples.start[row])
            parts = tuple(sample_parts(self.sources[stream.source], stream, start))
            tokens = sum(part.tokens for part in parts)
            origins.append(SampleOrigin(position, stream, epoch, start, tokens, parts))
        return origins


def stream_key(seed: int, purpose: str, stream: StreamPlan) -> int:
    """The key of a stream's draws for `purpose`. It does not depend on the phase."""
    return make_key(seed, purpose, stream.source, float(stream.low), float(stream.high))


def open_mixture(plan: Plan) -> OpenMixture:
    """The data order of a plan over its sources. UserError if one is missing or too short."""
    return OpenMixture(plan, open_sources(plan))


def _check(stream: StreamPlan, source: TokenSource) -> None:
    end = stream.first_window + stream.windows
    if stream.packing != "concatenate":
        unit, found, needed = "packs", len(source.packs[stream.sequence_length]), end
    else:
        unit, found, needed = "tokens", source.tokens, end * stream.window + 1
    if found < needed:
        raise UserError(
            f"sources.{stream.source}: has {found:,} {unit} where the plan reads {needed:,}; the "
            "data changed since it was planned, or `tokens` promised more: plan again"
        )


def sample_pieces(source: TokenSource, stream: StreamPlan, start: int) -> list[tuple[int, int]]:
    """(first token in the source, tokens) of each piece that makes a sample. `start`: as in
    `StepSamples`."""
    length = stream.sequence_length
    if stream.packing == "concatenate":
        return [(start, length + 1)]
    return source.packs[length].pieces(start // length)


def sample_parts(source: TokenSource, stream: StreamPlan, start: int) -> list[DocumentPart]:
    """The parts of documents that a sample shows, in order. `start`: as in `StepSamples`."""
    pieces = sample_pieces(source, stream, start)
    return [part for first, tokens in pieces for part in source.parts(first, tokens)]
