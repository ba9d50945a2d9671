"""Samples -> what a model eats: tokens, labels, loss mask, positions, document boundaries; and a digest to compare.

Masks and positions follow Megatron-Core (`megatron.core.datasets.gpt_dataset._get_ltor_masks_and_position_ids`): an
end-of-document token belongs to the document it ends; the position after it is 0 of the next one when boundaries reset;
and it is where the *input* is that token (its label opens the next document) that `mask_eod_loss` masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.permute import make_key, uniform_bits


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of n samples of S tokens. Every array is contiguous, writable and the batch's own.

    Attributes:
        tokens, labels: int64 [n, S]; labels[i, j] is the token after tokens[i, j].
        loss_mask: float32 [n, S], 1 or 0 for each label.
        position_ids: int64 [n, S].
        stream: int32 [n], index into the phase's streams.
        segments: int32 [n, S], number of the document within the sample, where boundaries reset; else None.
        digest: uint64 sum, modulo 2^64, over samples of a hash of (S + 1 tokens, position in the step): digests of the
            parts of a step add up to the digest of the step, in whatever parts the ranks took it.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    stream: NDArray[np.int32]
    segments: NDArray[np.int32] | None
    digest: int

    def __len__(self) -> int:
        return len(self.tokens)


def make_batch(
    windows: NDArray[Any],
    stream: NDArray[np.int32],
    positions: NDArray[np.int64],
    *,
    lengths: NDArray[np.int64] | None = None,
    eod_id: int | None = None,
    reset_at_eod: bool = False,
    mask_eod_loss: bool = False,
) -> Batch:
    """A batch from windows of S + 1 tokens (any integer type, [n, S + 1]).

    Args:
        stream, positions: [n], see `Batch`.
        lengths: int64 [n], tokens of each window that are real; what follows is padding, and no label there counts.
        eod_id: needed for `reset_at_eod` and `mask_eod_loss`.
    """
    if (reset_at_eod or mask_eod_loss) and eod_id is None:
        raise ValueError("make_batch: reset_at_eod and mask_eod_loss need eod_id")
    count, size = windows.shape[0], windows.shape[1] - 1
    tokens = windows[:, :-1].astype(np.int64, order="C")
    labels = windows[:, 1:].astype(np.int64, order="C")
    loss_mask = np.ones((count, size), dtype=np.float32)
    if lengths is not None and (lengths <= size).any():
        loss_mask[np.arange(1, size + 1) >= lengths[:, None]] = 0.0
    ends = tokens == eod_id if reset_at_eod or mask_eod_loss else None
    if mask_eod_loss:
        loss_mask[ends] = 0.0
    position_ids = np.empty((count, size), dtype=np.int64)
    position_ids[:] = np.arange(size, dtype=np.int64)
    segments = None
    if reset_at_eod:
        assert ends is not None
        opens = np.zeros((count, size), dtype=bool)
        opens[:, 1:] = ends[:, :-1]
        segments = np.cumsum(opens, axis=1, dtype=np.int32)
        position_ids -= np.maximum.accumulate(np.where(opens, position_ids, 0), axis=1)
    return Batch(
        tokens, labels, loss_mask, position_ids, stream, segments, digest(tokens, labels, positions)
    )


def digest(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], positions: NDArray[np.int64]
) -> int:
    """See `Batch.digest`. Of each sample a multilinear hash (sum of token j x random 64-bit constant j, modulo
    2^64; Carter and Wegman 1979), mixed with its position. Samples of ids below 2^17 collide with at most 2^-47."""
    factors = _factors(tokens.shape[1] + 1)
    with np.errstate(over="ignore"):
        hashes = (tokens @ factors[:-1] + labels[:, -1] * factors[-1]).astype(np.uint64)
        return int(uniform_bits(hashes, positions).sum(dtype=np.uint64)) if len(hashes) else 0


@lru_cache(maxsize=16)
def _factors(count: int) -> NDArray[np.int64]:
    return uniform_bits(make_key(0, "digest"), np.arange(count)).astype(np.int64)
