"""Histograms of document lengths with fixed bins, to be summed over parts, shards and datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_OCTAVE = 8


def log_edges(per_octave: int) -> NDArray[np.int64]:
    """Edges of half-open bins: 0, then the integers at or above 2^(k / per_octave) from 1 to 2^31.

    Every bin holds an integer: below 8 or so each length has its own bin. Edges of a divisor of
    `per_octave` are among those of `per_octave`.
    """
    powers = np.ceil(2.0 ** (np.arange(31 * per_octave + 1) / per_octave) - 1e-6).astype(np.int64)
    return np.append(0, np.unique(powers))


EDGES = log_edges(PER_OCTAVE)
"""Bin i of a length histogram holds lengths from EDGES[i] to EDGES[i + 1] - 1: bin 0 the empty
documents, the last one also all longer ones."""
BINS = len(EDGES) - 1


def length_histogram(lengths: NDArray[Any], times: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Documents (row 0) and their tokens (row 1) by length; histograms of shards add up.

    Args:
        lengths: tokens of each document, whole numbers >= 0, [n].
        times: how many documents have each length, [n] (1).

    Returns:
        int64 [2, BINS].
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    times = np.ones(1, dtype=np.int64) if times is None else np.asarray(times, dtype=np.int64)
    times = np.broadcast_to(times, lengths.shape)
    bins = np.minimum(np.searchsorted(EDGES, lengths, side="right") - 1, BINS - 1)
    out = np.zeros((2, BINS), dtype=np.int64)
    np.add.at(out[0], bins, times)
    np.add.at(out[1], bins, times * lengths)
    return out


def merged(histogram: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """`histogram` ([2, BINS]) over wider bins: int64 [2, n].

    `edges`: some of EDGES, first and last included.
    """
    return np.add.reduceat(histogram, np.searchsorted(EDGES, edges[:-1]), axis=1)
