"""What a phase reads of each source: which windows, from where, how often.

A source is shuffled in windows: fixed stretches of its tokens, or packs of whole documents
(`packing: best_fit` and `one_document`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megacode.errors import UserError
from megacode.plan.quota import ONE, Quota
from megacode.recipe.mixtures import Entry, mixture_entries
from megacode.recipe.schedules import Weights
from megacode.recipe.schema import FimLevel, LossOn, Packing, Phase, Recipe, SampleOrder

_MOST_EPOCH_STEPS = 50_000_000
PACKING_ALGORITHM = 1
"""Version of `megacode.data.best_fit`; raised when the same documents would be packed otherwise."""


@dataclass(frozen=True)
class StreamPlan:
    """One stream within one phase. Positions and sizes are in tokens of the source.

    In a packed source a window is a pack: `window` is the sequence length, `windows` counts
    packs, and tokens are those of whole sequences, padding included.

    Attributes:
        low, high: the part of the source, 0 and 1 for all of it.
        window: shuffle unit, a multiple of the phase's sequence length.
        first_window, windows: of the part.
        cursor: ordered position at the phase's start (multiple of the sequence length).
        samples: that the phase takes.
        sequence_length: the phase's.
        tokens_before: read from this stream in earlier phases.
        most_before: the most that these can be, where shares are decided while training.
        bounds: the fewest and the most samples, where the phase's shares are decided so.
        estimated: `windows` is worked out from the declared `tokens`, as if packs were full, or
            `documents`: the data is not there.
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
    most_before: int = 0
    bounds: tuple[int, int] | None = None
    fim_level: FimLevel = "context"
    packing: Packing = "concatenate"
    estimated: bool = False
    order: SampleOrder = "shuffled"
    loss_on: LossOn = "all"
    loss_weight: float = 1.0

    @property
    def label(self) -> str:
        """`python`, or `python[0.0-0.1]` for a part."""
        is_whole = (self.low, self.high) == (0.0, 1.0)
        return self.source if is_whole else f"{self.source}[{self.low}-{self.high}]"

    @property
    def epoch_tokens(self) -> int:
        """Tokens in one pass over the stream."""
        return self.windows * self.window

    @property
    def tokens(self) -> int:
        """Tokens that this phase takes."""
        return self.samples * self.sequence_length

    @property
    def tokens_after(self) -> int:
        """Tokens that the run has taken by the end of this phase."""
        return self.tokens_before + self.tokens

    @property
    def most_after(self) -> int:
        """The most tokens that the run can have taken by the end of this phase."""
        most = self.bounds[1] if self.bounds else self.samples
        return self.most_before + most * self.sequence_length

    @property
    def epochs(self) -> float:
        """Passes over the stream in this phase."""
        return self.tokens / self.epoch_tokens

    @property
    def epochs_after(self) -> float:
        """Passes over the stream from the run's start to the end of this phase."""
        return self.tokens_after / self.epoch_tokens

    @property
    def cursor_after(self) -> int:
        """Ordered position at the phase's end."""
        return self.cursor + self.tokens


@dataclass(frozen=True)
class SourceSizes:
    """How large sources are.

    Attributes:
        tokens: of every source that a phase reads.
        packs: of the packed ones, by (source, sequence length), where they are counted.
        windows: tokens of a window of the others, `window_sizes`.
        trained: tokens with a loss in an epoch of packed sources of conversations.
    """

    tokens: Mapping[str, int]
    packs: Mapping[tuple[str, int], int]
    windows: Mapping[str, int]
    trained: Mapping[str, int]

    def trained_per_sequence(self, name: str, length: int) -> float:
        """Tokens with a loss in a sequence of a source, on average."""
        packs = self.packs.get((name, length))
        if packs is None:
            return length
        # Of text, the first token of a pack has no loss.
        return self.trained.get(name, self.tokens[name] - packs) / max(packs, 1)


def window_sizes(recipe: Recipe, where: str) -> dict[str, int]:
    """Window of every source that is not packed: its own, else the first sequence
    length it is read at."""
    lengths: dict[str, list[int]] = {}
    for phase in recipe.phases:
        for entry in mixture_entries(recipe, phase):
            if recipe.packing(entry.source) == "concatenate":
                lengths.setdefault(entry.source, []).append(phase.sequence_length)
    sizes, problems = {}, []
    for name, read in lengths.items():
        given = recipe.sources[name].window
        sizes[name] = size = given or read[0]
        if any(size % length for length in read):
            problems.append(
                f"{where}sources.{name}.window: {size:,} tokens{'' if given else ' (by default)'} "
                "is no multiple of every sequence length the source is read at "
                f"({', '.join(map(str, dict.fromkeys(read)))}); set it to {math.lcm(*read)}"
            )
    if problems:
        raise UserError("\n".join(problems))
    return sizes


def plan_stream(
    recipe: Recipe,
    entry: Entry,
    length: int,
    samples: int,
    sizes: SourceSizes,
    earlier: StreamPlan | None,
) -> StreamPlan:
    """A stream of a phase with sequences of `length`, which goes on from what `earlier` phases read
    of it.

    Raises:
        UserError: there is not one whole window, or it would go on in packs of another length,
        which share no order.
    """
    name, packing = entry.source, recipe.packing(entry.source)
    tokens, counted = sizes.tokens[name], sizes.packs.get((name, length))
    if packing == "concatenate":
        window = sizes.windows[name]
        total, shown = max(tokens - 1, 0) // window, f"windows of {window:,} tokens"
        empty = (
            f"has {tokens:,} tokens, fewer than one window of {window:,} + 1; give it more data, a "
            "shorter sequence_length, or take it out of the mixture"
        )
    else:
        window, shown = length, f"packs of {length + 1:,} tokens"
        documents = recipe.sources[name].documents if packing == "one_document" else None
        estimate = documents or -(-tokens // (length + 1))
        total = estimate if counted is None else counted
        empty = "has no documents; give it data, or take it out of the mixture"
    if total == 0:
        raise UserError(f"{entry.key}: source {name} {empty}")
    low, high = entry.given.subset_range
    # Fractions of the decimals as they are written.
    first, end = (math.floor(Fraction(str(bound)) * total) for bound in (low, high))
    if end == first:
        raise UserError(
            f"{entry.key}.subset: {entry.given.subset} of source {name} ({total:,} {shown}) holds "
            "no whole window; widen the subset"
        )
    if entry.restart or earlier is None:
        stopped_at = 0
    elif packing != "concatenate" and earlier.sequence_length != length:
        raise UserError(
            f"{entry.key}: source {name} is packed ({packing}) for {length:,} tokens here and for "
            f"{earlier.sequence_length:,} before, and the two share no order to go on in; set "
            "`cursor: restart` here, which reads it from its start again, give this phase a "
            f"`subset` of it that was not read, or set sources.{name}.packing: concatenate"
        )
    else:
        stopped_at = earlier.cursor_after
    return StreamPlan(
        source=name,
        domain=entry.domain,
        low=low,
        high=high,
        fim_rate=entry.fim_rate,
        window=window,
        first_window=first,
        windows=end - first,
        cursor=-(-stopped_at // length) * length,
        samples=samples,
        sequence_length=length,
        tokens_before=earlier.tokens_after if earlier else 0,
        most_before=earlier.most_after if earlier else 0,
        fim_level=entry.fim_level,
        packing=packing,
        estimated=packing != "concatenate" and counted is None,
        order=recipe.sources[name].order,
        loss_on=recipe.sources[name].loss_on,
        loss_weight=entry.given.loss_weight,
    )


def epoch_steps(
    recipe: Recipe, phase: Phase, entries: Sequence[Entry], sizes: SourceSizes, quota: Quota
) -> int:
    """The fewest whole steps in which a phase reads its sources (or `epochs_of`) `epochs` times.

    UserError: see `plan_stream`; or a source that is to be read has no weight at the end.
    """
    assert phase.epochs is not None
    needed = {}
    for column, entry in enumerate(entries):
        if phase.epochs_of in (None, entry.source):
            stream = plan_stream(recipe, entry, phase.sequence_length, 0, sizes, None)
            sequences = stream.epoch_tokens // phase.sequence_length
            needed[column] = math.ceil(Fraction(str(phase.epochs)) * sequences)

    def enough(steps: int) -> bool:
        taken = quota.before(steps)
        return all(taken[column] >= samples for column, samples in needed.items())

    def hopeless(steps: int) -> bool:
        """Whether a source has no share any more, and lacks more than a rounding."""
        if steps <= quota.weights.settled:
            return False
        taken, shares = quota.before(steps), quota.shares(np.array([steps]))[0]
        return any(not shares[c] and taken[c] + 1 < samples for c, samples in needed.items())

    most = 1
    while not enough(most):
        most *= 2
        if most > _MOST_EPOCH_STEPS or hopeless(most):
            raise UserError(
                f"phases.{phase.name}.epochs: more than {_MOST_EPOCH_STEPS:,} steps; name the "
                "source that counts with `epochs_of`, or raise its weight"
            )
    fewest = most // 2
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if enough(middle) else (middle, most)
    return most


def clipped_weights(
    recipe: Recipe,
    phase: Phase,
    entries: Sequence[Entry],
    sizes: SourceSizes,
    quota: Quota,
    steps: int,
    read: Mapping[tuple[str, float, float], StreamPlan],
) -> Weights | None:
    """Weights under which no stream is read more often than its `max_epochs`; None if none is.

    What a stream may not read goes to the others by their weights, until all fit.

    Args:
        read: what earlier phases read of streams.

    Raises:
        UserError: see `plan_stream`; or every stream has a cap, and together they do not fill the
            phase.
    """
    total = int(quota.batch.before(np.array([steps]))[0])
    first = quota.shares(np.array([0]))[0] / ONE
    wanted, caps = first * total, np.full(len(entries), np.inf)
    for column, entry in enumerate(entries):
        if entry.given.max_epochs is not None:
            earlier = read.get((entry.source, *entry.given.subset_range))
            stream = plan_stream(recipe, entry, phase.sequence_length, 0, sizes, earlier)
            most = Fraction(str(entry.given.max_epochs)) * stream.epoch_tokens
            samples = int(most - stream.tokens_before) // stream.sequence_length
            caps[column] = max(samples, 0)
    full = np.zeros(len(entries), dtype=bool)
    while (over := ~full & (wanted > caps)).any():
        full |= over
        free = first[~full].sum()
        if free <= 0:
            have = int(caps[first > 0].sum())
            raise UserError(
                f"phases.{phase.name}.mixture.over_epochs: its sources have {have:,} sequences "
                f"within their max_epochs, and the phase has {total:,}; shorten it or raise "
                "max_epochs"
            )
        # Half a sample less: rounding does not take one more than the cap.
        capped = np.maximum(caps - 0.5, 0)
        wanted = np.where(full, capped, first * (total - capped[full].sum()) / free)
    if not full.any():
        return None
    inner = tuple((column, 1.0) for column in range(len(entries)))
    return Weights(tuple(wanted.tolist()), inner, steps)


def check_epochs(
    entry: Entry, stream: StreamPlan, quota: Quota, column: int, steps: int
) -> str | None:
    """A problem if a stream is read more often than its `max_epochs`; says how many steps fit."""
    cap = entry.given.max_epochs
    if cap is None or stream.most_after <= cap * stream.epoch_tokens:
        return None
    if stream.most_after > stream.tokens_after:
        return (
            f"{entry.key}.max_epochs: source {stream.label} can be read up to "
            f"{stream.most_after / stream.epoch_tokens:.4g} times by the end of this phase, more "
            f"than {cap:g}, because shares are decided while training; take steps away, raise "
            "max_epochs, or fix the shares (`online`)"
        )
    most = int(Fraction(str(cap)) * stream.epoch_tokens - stream.tokens_before)
    fits, too_many = 0, steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if quota.before(middle)[column] <= most // stream.sequence_length:
            fits = middle
        else:
            too_many = middle
    remedy = f"at most {fits:,} steps of this phase fit" if fits else "no step of this phase fits"
    return (
        f"{entry.key}.max_epochs: source {stream.label} would be read {stream.epochs_after:.4g} "
        f"times by the end of this phase, more than {cap:g}; {remedy}; lower its weight or raise "
        "max_epochs"
    )
