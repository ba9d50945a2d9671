"""How many samples of each stream every step takes: exact, and for any step at once.

**What holds.** Let w[t, s] be the normalised weight of stream s in step t, B[t] the batch size, and
C[t, s] the sum of B[u] w[u, s] over the steps u <= t: the share that s is due. The counts N[t, s]
of samples taken after step t are whole numbers with

* |N[t, s] - C[t, s]| < 1: every stream is within one sample of its share after every step;
* sum over s of N[t, s] = sum over u <= t of B[u]: every step is full;
* N never falls.

**Why it can be done.** Sample k of stream s becomes available in the first step where C > k - 1 and
is due in the first step where C >= k. The shares themselves are a (fractional) schedule that takes
every sample between the two, so a whole one exists, and taking what is due first finds it (this is
the chairman assignment problem: Tijdeman, Discrete Mathematics 32, 1980; level schedules: Steiner
and Yeomans, Management Science 39, 1993). Among samples that are due in the same step, the one that
is furthest along (the largest fraction of C) is taken first, then the lower stream.

**What it costs.** Where every stream gets at least one sample's worth in every step, all pending
samples are due in the next step, so N is the floor of C plus one for the largest fractions: a
formula, and with constant weights C is one too. Elsewhere (a share below 1/B) steps depend on
earlier ones; they are computed in chunks when first asked for, 3 to 10 microseconds each, and the
state between chunks is kept.

**Exactness.** Weights become whole numbers of 2^-40 whose sum is exactly 2^40; C is held as a whole
part and a fraction in 2^-40. Nothing is rounded after that, and nothing looks at the phase's length
or at later phases.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from megacode.recipe.schedules import BatchSizes, Floats, Ints, Weights

BITS = 40
ONE = 1 << BITS
CHUNK = 1024
_HALF = BITS // 2
_NEVER = np.int64(1) << 62
_KEPT_TABLES = 8

Table = tuple[Ints, Ints]


def normalise(weights: Floats) -> Ints:
    """Weights [steps, streams] as whole numbers of 2^-40 whose rows sum to exactly 2^40, by largest
    remainder.

    A stream of weight zero stays at zero. Every row needs a positive sum.
    """
    total = np.zeros(len(weights))
    for column in weights.T:  # in order: numpy's sum may group terms by the processor
        total = total + column
    scaled = weights / total[:, None] * ONE
    whole = np.floor(scaled).astype(np.int64)
    remainder = np.where(weights > 0, scaled - whole, -1.0)
    return whole + _largest(remainder, ONE - whole.sum(axis=1))


def _largest(keys: Floats | Ints, how_many: Ints) -> Ints:
    """1 at the `how_many` largest keys of each row (the lower column first among
    equals), 0 elsewhere."""
    order = np.argsort(-keys, axis=1, kind="stable")
    chosen = np.arange(keys.shape[1]) < how_many[:, None]
    out = np.zeros(keys.shape, dtype=np.int64)
    np.put_along_axis(out, order, chosen.astype(np.int64), axis=1)
    return out


def multiply(samples: Ints, shares: Ints) -> Table:
    """samples x shares / 2^40 as (whole part, fraction in 2^-40), without overflow for samples
    below 2^42."""
    mask = (1 << _HALF) - 1
    high, low = samples >> _HALF, samples & mask
    share_high, share_low = shares >> _HALF, shares & mask
    cross = high * share_low + low * share_high
    fraction = ((cross & mask) << _HALF) + low * share_low
    return high * share_high + (cross >> _HALF) + (fraction >> BITS), fraction & (ONE - 1)


@dataclass(frozen=True, eq=False)
class Quota:
    """Counts per stream over the steps of one phase (0 for its first), for as many steps as one
    asks for.

    Attributes:
        schedule: weights of the phase, or of the longer phase that it is a piece of.
        stairs: batch sizes of that phase.
        first: its step at which this phase begins. Samples taken before are not counted; what was
            due before is.
    """

    schedule: Weights
    stairs: BatchSizes
    first: int = 0
    _anchors: dict[int, Table] = field(default_factory=dict, repr=False)
    _tables: dict[int, Table] = field(default_factory=dict, repr=False)
    _counts: dict[int, Ints] = field(default_factory=dict, repr=False)
    _ahead: dict[int, int] = field(default_factory=dict, repr=False)
    _is_free: dict[int, bool] = field(default_factory=dict, repr=False)

    @property
    def streams(self) -> int:
        return len(self.schedule.inner)

    @cached_property
    def weights(self) -> Weights:
        """Of this phase's steps."""
        return replace(self.schedule, first=self.schedule.first + self.first)

    @cached_property
    def batch(self) -> BatchSizes:
        """Of this phase's steps."""
        return self.stairs.after(self.first)

    def shares(self, steps: Ints) -> Ints:
        """Normalised weights at `steps`: int64 [len(steps), streams], rows sum to 2^40."""
        return normalise(self.weights.at(steps))

    def before(self, step: int) -> Ints:
        """int64 [streams]: samples of each stream in all steps before `step`."""
        return self._taken(step + self.first) - self._taken(self.first)

    def range(self, start: int, stop: int) -> Ints:
        """int64 [stop - start + 1, streams]: `before` of start, start + 1 ... stop."""
        begin, end = start + self.first, stop + self.first
        parts = [self._taken(begin)[None]]
        for chunk in range(begin // CHUNK, -(-end // CHUNK)):
            zero = chunk * CHUNK
            rows = slice(max(begin - zero, 0) + 1, min(end - zero, CHUNK) + 1)
            parts.append(self._chunk_counts(chunk)[rows])
        return np.concatenate(parts) - self._taken(self.first)

    # From here on, steps are those of `schedule` and `stairs`.

    def _taken(self, step: int) -> Ints:
        """N before `step`: int64 [streams]."""
        if step <= 0:
            return np.zeros(self.streams, dtype=np.int64)
        chunk = (step - 1) // CHUNK
        if not self._free(chunk):
            return self._chunk_counts(chunk)[step - chunk * CHUNK].copy()
        if chunk * CHUNK >= self._tail:
            return _round(*self._closed(np.array([step])))[0]
        whole, fraction = self._table(chunk)
        row = slice(step - chunk * CHUNK, step - chunk * CHUNK + 1)
        return _round(whole[row], fraction[row])[0]

    def _shares(self, steps: Ints) -> Ints:
        return normalise(self.schedule.at(steps))

    # --------------------------------------------------------------------- C, the cumulative shares

    @cached_property
    def _tail(self) -> int:
        """First chunk boundary at or after which the weights no longer move; there C
        has a formula."""
        return -(-self.schedule.settled // CHUNK) * CHUNK

    @cached_property
    def _final_shares(self) -> Ints:
        return self._shares(np.array([self._tail]))[0]

    def _anchor(self, chunk: int) -> Table:
        """C before the first step of a chunk (at most the tail's), as (whole, fraction), int64
        [streams] each."""
        if chunk == 0:
            zero = np.zeros(self.streams, dtype=np.int64)
            return zero, zero
        known = chunk
        while known > 0 and known not in self._anchors:
            known -= 1
        for number in range(known, chunk):
            whole, fraction = self._moving(number)
            self._anchors[number + 1] = (whole[-1].copy(), fraction[-1].copy())
        return self._anchors[chunk]

    def _moving(self, chunk: int) -> Table:
        """C after 0 ... CHUNK steps of a chunk before the tail, summed up from the anchor."""
        first_whole, first_fraction = self._anchor(chunk)
        steps = _steps(chunk)[:-1]
        whole, fraction = multiply(self.stairs.at(steps)[:, None], self._shares(steps))
        whole = np.cumsum(np.concatenate([first_whole[None], whole]), axis=0)
        fraction = np.cumsum(np.concatenate([first_fraction[None], fraction]), axis=0)
        return whole + (fraction >> BITS), fraction & (ONE - 1)

    def _closed(self, steps: Ints) -> Table:
        """C before each of `steps`, all at or after the tail."""
        whole, fraction = self._anchor(self._tail // CHUNK)
        samples = self.stairs.before(steps) - self.stairs.before(np.array([self._tail]))
        more_whole, more_fraction = multiply(samples[:, None], self._final_shares)
        fraction = fraction + more_fraction
        return whole + more_whole + (fraction >> BITS), fraction & (ONE - 1)

    def _table(self, chunk: int) -> Table:
        """C after 0 ... CHUNK steps of a chunk: (whole, fraction), int64 [CHUNK + 1,
        streams] each."""
        table = self._tables.get(chunk)
        if table is None:
            is_tail = chunk * CHUNK >= self._tail
            table = self._closed(_steps(chunk)) if is_tail else self._moving(chunk)
            _keep(self._tables, chunk, table)
        return table

    # -------------------------------------------------------------------------------- N, the counts

    def _free(self, chunk: int) -> bool:
        """Whether no step of the chunk depends on an earlier one: every stream gets at least a
        sample's worth in each step (and in the one after the chunk), or has had nothing and gets
        nothing."""
        if chunk not in self._is_free:
            first = chunk * CHUNK
            if first >= self._tail:
                shares = self._final_shares[None]
                fraction = self._anchor(self._tail // CHUNK)[1]
                steps = np.array([first])
            else:
                steps = _steps(chunk)
                shares, fraction = self._shares(steps), self._anchor(chunk)[1]
            enough = (self.stairs.at(steps)[:, None] * shares >= ONE).all(axis=0)
            absent = (shares == 0).all(axis=0) & (fraction == 0)
            self._is_free[chunk] = bool((enough | absent).all())
        return self._is_free[chunk]

    def _chunk_counts(self, chunk: int) -> Ints:
        """N after 0 ... CHUNK steps of a chunk: int64 [CHUNK + 1, streams]. In a free chunk row 0
        is not meaningful."""
        counts = self._counts.get(chunk)
        if counts is None:
            table = self._table(chunk)
            counts = _round(*table) if self._free(chunk) else self._walk(chunk, *table)
            _keep(self._counts, chunk, counts)
        return counts

    def _ahead_at(self, chunk: int) -> int:
        """Streams (as bits) that are one above the floor of C before the first step of a chunk."""
        known = chunk
        while known > 0 and known not in self._ahead and not self._free(known - 1):
            known -= 1
        for number in range(known, chunk + 1):
            if number == 0:
                self._ahead[0] = 0
            elif number not in self._ahead:
                whole, fraction = self._table(number - 1)
                if self._free(number - 1):
                    ahead = _round(whole[-1:], fraction[-1:])[0] - whole[-1]
                else:
                    ahead = self._chunk_counts(number - 1)[-1] - whole[-1]
                self._ahead[number] = sum(1 << int(stream) for stream in np.flatnonzero(ahead))
        return self._ahead[chunk]

    def _walk(self, chunk: int, whole: Ints, fraction: Ints) -> Ints:
        """N of a chunk, step by step: what is due first, first."""
        ahead = self._ahead_at(chunk)
        due = self._due(chunk, whole, fraction)
        nothing = (fraction[1:] == 0).astype(np.int64)  # no sample is available: last
        order = np.lexsort((-fraction[1:], due, nothing), axis=-1)
        above = (fraction[1:].sum(axis=1) >> BITS).tolist()
        unchanged = _bits(whole[1:] == whole[:-1])
        bit = [1 << stream for stream in range(self.streams)]
        states = [ahead]
        for row, needed, same in zip(order.tolist(), above, unchanged, strict=True):
            ahead &= same  # taken early and not yet due: stays taken
            missing = needed - ahead.bit_count()
            if missing:
                for stream in row:
                    if not ahead & bit[stream]:
                        ahead |= bit[stream]
                        missing -= 1
                        if not missing:
                            break
            states.append(ahead)
        return whole + _from_bits(states, self.streams)

    def _due(self, chunk: int, whole: Ints, fraction: Ints) -> Ints:
        """Step count at which each stream's next sample is due, after each step of a chunk: int64
        [CHUNK, streams]."""
        if chunk * CHUNK >= self._tail:
            now = self.stairs.before(_steps(chunk)[1:])
            return self._due_by_formula(now[:, None], fraction[1:], self._final_shares)
        arrives = np.where(whole[1:] > whole[:-1], _steps(chunk)[1:, None], _NEVER)
        later = np.minimum.accumulate(arrives[::-1], axis=0)[::-1]
        beyond = self._due_beyond(chunk, whole[-1] + 1)
        return np.minimum(np.concatenate([later[1:], np.full((1, self.streams), _NEVER)]), beyond)

    def _due_by_formula(self, samples: Ints, fraction: Ints, shares: Ints) -> Ints:
        missing = -((fraction - ONE) // np.maximum(shares, 1))
        return np.where(shares > 0, self.stairs.steps_for(samples + missing), _NEVER)

    def _due_beyond(self, chunk: int, wanted: Ints) -> Ints:
        """First step count after a chunk at which C reaches `wanted` (one per stream), while the
        weights move or later."""
        due = np.full(self.streams, -1, dtype=np.int64)
        last = self._tail // CHUNK
        for number in range(chunk + 1, last):
            reached = (due < 0) & (self._anchor(number + 1)[0] >= wanted)
            if reached.any():
                table = self._table(number)[0]
                for stream in np.flatnonzero(reached):
                    due[stream] = number * CHUNK + np.searchsorted(
                        table[:, stream], wanted[stream], side="left"
                    )
            if (due >= 0).all():
                return due
        start = self.stairs.before(np.array([self._tail]))
        formula = self._due_by_formula(start, self._anchor(last)[1], self._final_shares)
        return np.where(due < 0, formula, due)


@dataclass(frozen=True, eq=False)
class BlockQuota(Quota):
    """Weights that are constant in blocks of `every` steps, and known up to `schedule.settled`; the
    last known ones hold from there on.

    The counts of a block depend on nothing after it. In a block of S samples a stream is due S w
    and what it is owed, C - N at the block's start; within the block, counts follow constant
    weights in proportion to these. So N < C + 1 at the end of each block; and N > C - 1 where no
    stream is due less than nothing, else N > C - streams. Inside a block C - streams - 1 < N
    < C + 2.
    """

    every: int = 1

    @cached_property
    def _known(self) -> Ints:
        """int64 [known steps + 1, streams]: N after so many steps."""
        return self._blocks[0]

    @property
    def owed(self) -> Floats:
        """float64 [streams]: C - N after the known steps."""
        return self._blocks[1]

    @cached_property
    def _blocks(self) -> tuple[Ints, Floats]:
        weights, known = self.schedule, self.schedule.settled
        edges = np.unique(np.arange(-weights.first, known + 1, self.every).clip(0))
        sizes = self.stairs.at(np.arange(known)).tolist()
        owed = np.zeros(self.streams)
        parts = [np.zeros((1, self.streams), dtype=np.int64)]
        shares = self._shares(edges[:-1]) / ONE
        for row, first, end in zip(shares, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            due = row * sum(sizes[first:end]) + owed
            counts = _block_counts(tuple(due.clip(0).tolist()), tuple(sizes[first:end]))
            owed = due - counts[-1]
            parts.append(counts[1:] + parts[-1][-1])
        return np.concatenate(parts), owed

    @cached_property
    def _after(self) -> Quota:
        """Of the steps after the known ones."""
        known = len(self._known) - 1
        return Quota(_constant(self.schedule.at(np.array([known]))[0]), self.stairs.after(known))

    def _taken(self, step: int) -> Ints:
        beyond = step - len(self._known) + 1
        return self._known[-1] + self._after.before(beyond) if beyond > 0 else self._known[step]

    def range(self, start: int, stop: int) -> Ints:
        begin, end, known = start + self.first, stop + self.first, len(self._known) - 1
        rows = self._known[begin : end + 1]
        if end > known:
            more = self._known[-1] + self._after.range(max(begin - known, 0), end - known)
            rows = np.concatenate([rows[:-1], more]) if begin <= known else more
        return rows - self._taken(self.first)


def _constant(weights: Floats) -> Weights:
    ratios = tuple(weights.tolist())
    return Weights(ratios, tuple((number, 1.0) for number in range(len(ratios))), 1)


@lru_cache(maxsize=1 << 14)
def _block_counts(weights: tuple[float, ...], sizes: tuple[int, ...]) -> Ints:
    """int64 [steps + 1, streams]: N after 0 ... all steps of a block of these batch sizes."""
    each = np.array(sizes, dtype=np.int64)
    totals = np.concatenate([np.zeros(1, np.int64), each.cumsum()[:-1]])
    stairs = BatchSizes(np.arange(len(each)), each, totals)
    return Quota(_constant(np.array(weights)), stairs).range(0, len(each))


def phase_quota(
    weights: Weights,
    batch: BatchSizes,
    mixture_first: int,
    batch_first: int,
    every: int | None = None,
) -> Quota:
    """The quota of a phase whose mixture and batch size began that many steps before it; its counts
    began with the later of the two. `every`: steps of a block where counts begin anew in each."""
    counted = min(mixture_first, batch_first)
    schedule = replace(weights, first=mixture_first - counted)
    stairs = batch.after(batch_first - counted)
    if every:
        return BlockQuota(schedule, stairs, counted, every=every)
    return Quota(schedule, stairs, counted)


def _steps(chunk: int) -> Ints:
    """The chunk's steps and the one after it: int64 [CHUNK + 1]."""
    return np.arange(chunk * CHUNK, (chunk + 1) * CHUNK + 1, dtype=np.int64)


def _round(whole: Ints, fraction: Ints) -> Ints:
    """The floor, plus one for the largest fractions, so that each row's sum is the sum of C."""
    return whole + _largest(fraction, fraction.sum(axis=1) >> BITS)


def _bits(rows: np.ndarray) -> list[int]:
    """Rows of booleans as whole numbers, column 0 the lowest bit."""
    packed = np.packbits(rows, axis=1, bitorder="little")
    width, data = packed.shape[1], packed.tobytes()
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def _from_bits(numbers: list[int], columns: int) -> Ints:
    width = -(-columns // 8)
    data = b"".join(number.to_bytes(width, "little") for number in numbers)
    rows = np.frombuffer(data, dtype=np.uint8).reshape(len(numbers), width)
    return np.unpackbits(rows, axis=1, bitorder="little", count=columns).astype(np.int64)


def _keep(cache: dict, key: int, value: object) -> None:
    """Remember a chunk and forget the oldest. Harmless when a loader's thread does the same at the
    same time."""
    cache[key] = value
    for old in list(cache)[:-_KEPT_TABLES]:
        cache.pop(old, None)
