"""A micro-batch with document boundaries as one row of documents, and a context-parallel rank's
share of it.

Attention over c context-parallel ranks cuts every document into 2 c equal slices: rank r has slices
r and 2 c - 1 - r, so that all have the same causal work. Documents are padded at their ends to
where that is possible. Nothing looks at the padding, because attention is causal, and it has no
loss. Which tokens a step reads does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.batch import Batch


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One rank's share of a row of T tokens, T / c of them.

    Attributes:
        tokens, labels, position_ids: int64 `[1, T / c]`; 0 in the padding.
        loss_mask: float32 `[1, T / c]`; 0 in the padding.
        edges: int32 `[documents + 1]`, where each document of the whole row begins, and its end T.
        sample_tokens: of each sample in this share, in order; the last one's with what is left.
        members, label_roles: as the batch has them, `[1, T / c]`; 0 in the padding.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    edges: NDArray[np.int32]
    sample_tokens: tuple[int, ...]
    members: NDArray[np.int32] | None = None
    label_roles: NDArray[np.uint8] | None = None


def packed_length(batch: Batch, size: int) -> int:
    """Tokens T of a micro-batch as one row for `size` context-parallel ranks."""
    return int(_padded(_documents(batch)[1], size).sum())


def pack_row(batch: Batch, length: int, size: int = 1, rank: int = 0) -> PackedRow:
    """The share of context-parallel rank `rank` of `size`.

    Args:
        length: T; at least `packed_length`. What is more is one more document of padding. One rank
            has no padding.
    """
    first, real = _documents(batch)
    count, each = batch.tokens.shape
    if size == 1:
        edges = np.append(first, batch.tokens.size).astype(np.int32)
        return _row(batch, lambda array: array.reshape(1, -1), edges, (each,) * count)
    padded = _padded(real, size)
    samples = first // each
    if left := length - int(padded.sum()):
        first, real = np.append(first, 0), np.append(real, 0)
        padded, samples = np.append(padded, left), np.append(samples, samples[-1])
    edges = np.append(0, np.cumsum(padded))
    # Of every place in the row the token that stands there; -1 is padding.
    inside = np.arange(length) - np.repeat(edges[:-1], padded)
    source = np.where(inside < np.repeat(real, padded), np.repeat(first, padded) + inside, -1)
    slices = inside * (2 * size) // np.repeat(padded, padded)
    source = source[(slices == rank) | (slices == 2 * size - 1 - rank)]
    shares = np.bincount(samples, padded // size, count).astype(int)

    def share(array: NDArray[Any]) -> NDArray[Any]:
        return np.where(source >= 0, array.reshape(-1)[source], 0).astype(array.dtype)[None]

    return _row(batch, share, edges.astype(np.int32), tuple(shares.tolist()))


def _row(
    batch: Batch,
    part: Callable[[NDArray[Any]], NDArray[Any]],
    edges: NDArray[np.int32],
    sample_tokens: tuple[int, ...],
) -> PackedRow:
    arrays = {name: part(array) for name, array in batch.by_token().items()}
    return PackedRow(**arrays, edges=edges, sample_tokens=sample_tokens)


def _documents(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token, in all samples end to end, and length of every document: int64 `[documents]`."""
    assert batch.segments is not None
    opens = np.ones(batch.segments.shape, dtype=bool)
    opens[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
    first = np.flatnonzero(opens)
    return first, np.diff(np.append(first, opens.size))


def _padded(lengths: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    unit = 2 * size if size > 1 else 1
    return -(-lengths // unit) * unit
