"""Best-fit packing: documents into packs, cutting none that fits (Ding et al., arXiv 2404.10830).

A *pack* has room for `capacity` tokens. A longer document is first cut into whole packs; its rest,
and every shorter document, is a *piece*. Pieces are placed longest first, each into the pack in
which the least room stays (best-fit decreasing), else into a new one. Every token is in exactly one
pack.

**How it is fast.** Pieces of one length are interchangeable, and so are packs with the same room.
For a length m and a room r, as many packs of that room as there are take r // m pieces each, in one
move. A room that was used is less than half of what it was, so there are O(capacity log capacity)
moves, however many documents there are; the rest is a counting sort. The rooms that exist are the
bits of one integer.

**What is packed together.** `BLOCK` consecutive documents of a shard, so that memory stays small
and one shard's packs depend on nothing else. The packs of a block are then put in a keyed random
order: the moves make those of long documents first, and a part of a source (`subset`) must be like
the whole. Pieces stand in a pack in the order of the source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacode.data.permute import make_key, permute
from megacode.plan.streams import PACKING_ALGORITHM

BLOCK = 1 << 18
"""Documents packed together. Another number is another algorithm."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack i holds the pieces [first[i], first[i + 1]): piece j is `tokens[j]` tokens from token
    number `start[j]` on."""

    first: Ints
    start: Ints
    tokens: Ints

    def __len__(self) -> int:
        return len(self.first) - 1


def pack_documents(
    start: Ints, tokens: Ints, capacity: int, block: int = 0, *, together: bool = True
) -> Packs:
    """Packs of the documents of one block.

    Args:
        start, tokens: int64 [documents]: where each begins, and its length (0 is no piece).
        block: its number, which keys the order of its packs.
        together: False: each piece is a pack, in the order of the source.
    """
    whole = tokens // capacity
    rest = tokens - whole * capacity
    pieces = whole + (rest > 0)
    before = np.cumsum(pieces) - pieces
    part = np.arange(int(pieces.sum())) - np.repeat(before, pieces)  # 0, 1, ... in each document
    begin = np.repeat(start, pieces) + part * capacity
    size = np.full(len(begin), capacity, dtype=np.int64)
    left = (before + whole)[rest > 0]  # pieces that are no whole pack
    size[left] = rest[rest > 0]
    if not together:
        return Packs(np.arange(len(begin) + 1), begin, size)
    number = np.zeros(len(begin), dtype=np.int64)
    number[size == capacity] = np.arange(len(begin) - len(left))
    bins, opened = best_fit(size[left], capacity)
    number[left] = bins + (len(begin) - len(left))
    count = len(begin) - len(left) + opened
    if count:
        key = make_key(PACKING_ALGORITHM, "packs", block)
        number = permute(np.arange(count), count, key).astype(np.int64)[number]
    # Sort by pack and, in it, by place. Sorting plain numbers is several times faster than argsort.
    bits = len(begin).bit_length()
    sequence = np.sort((number << bits) | np.arange(len(begin))) & ((1 << bits) - 1)
    first = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=count))])
    return Packs(first.astype(np.int64), begin[sequence], size[sequence])


def best_fit(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """Best-fit decreasing of `lengths` (int64 [n], 1 ... capacity): the bin of each, int64 [n], and
    how many bins there are."""
    moves, opened = _moves(np.bincount(lengths, minlength=capacity + 1), capacity)
    first, bins, each = np.array(moves, dtype=np.int64).reshape(-1, 3).T
    # Moves take the pieces from the longest to the shortest, `each` for one bin after another.
    taken = bins * each
    number = np.arange(len(lengths)) - np.repeat(np.cumsum(taken) - taken, taken)
    kind = np.uint16 if capacity < 1 << 16 else np.int64  # numpy sorts 16 bits by radix
    longest_first = np.argsort((capacity - lengths).astype(kind), kind="stable")
    out = np.empty(len(lengths), dtype=np.int64)
    out[longest_first] = np.repeat(first, taken) + number // np.repeat(each, taken)
    return out, opened


def _moves(counts: Ints, capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """(first bin, bins, pieces for each bin) by falling length, and how many bins there are.

    Args:
        counts: int64 [capacity + 1], pieces of each length.
    """
    moves: list[tuple[int, int, int]] = []
    opened = 0
    ranges: dict[int, list[tuple[int, int]]] = {}  # room -> bins [begin, end) that have it
    rooms = 0  # bit r: there are bins with room r

    def give(room: int, begin: int, end: int) -> None:
        nonlocal rooms
        if room and begin < end:
            ranges.setdefault(room, []).append((begin, end))
            rooms |= 1 << room

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            fitting = rooms >> size
            if fitting:  # the least room that suffices
                room = size + (fitting & -fitting).bit_length() - 1
                begin, end = ranges[room].pop()
                if not ranges[room]:
                    del ranges[room]
                    rooms ^= 1 << room
            else:
                room, begin = capacity, opened
                end = opened = opened + -(-left // (capacity // size))
            each = room // size
            full = min(end - begin, left // each)
            if full:
                moves.append((begin, full, each))
                left -= full * each
                give(room - each * size, begin, begin + full)
                begin += full
            if begin < end:
                if left:  # fewer than one bin takes
                    moves.append((begin, 1, left))
                    give(room - left * size, begin, begin + 1)
                    begin, left = begin + 1, 0
                give(room, begin, end)
    return moves, opened
