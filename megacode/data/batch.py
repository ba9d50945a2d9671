"""Samples -> arrays for the model: tokens, labels, loss mask, positions, documents; and a digest.

Masks and positions follow Megatron-Core
(`megatron.core.datasets.gpt_dataset._get_ltor_masks_and_position_ids`). An end-of-document token
belongs to the document that it ends. Where boundaries reset, the position after it is 0 of the next
document. `mask_eod_loss` masks where the *input* is that token: its label opens the next document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.loss_marks import FIRST, ROLES, trained
from megacode.data.permute import make_key, uniform_bits
from megacode.recipe.schema import LossOn


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of n samples of S tokens. Arrays are contiguous, writable and not shared.

    Attributes:
        tokens, labels: int64 [n, S]; labels[i, j] is the token after tokens[i, j].
        loss_mask: float32 [n, S], 1 or 0 for each label.
        position_ids: int64 [n, S].
        stream: int32 [n], index into the phase's streams.
        segments: int32 [n, S], number of the document in the sample; None unless boundaries reset.
        members: int32 [n, S], number in `roles`, from 1, of the member of a pair that the token
            belongs to, 0 of none; None unless samples are of pairs, and boundaries reset.
        roles: uint8 [members], QUERY, EQUIVALENT or OTHER; a query begins a pair. With `members`.
        label_roles: uint8 [n, S], role of each label, 0 of none; None unless samples are of pairs.
        digest: sum modulo 2^64, over samples, of a hash of (S + 1 tokens, position in the step).
            Digests of the parts of a step add up to the step's, however ranks divide it.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    stream: NDArray[np.int32]
    segments: NDArray[np.int32] | None
    digest: int
    members: NDArray[np.int32] | None = None
    roles: NDArray[np.uint8] | None = None
    label_roles: NDArray[np.uint8] | None = None

    def by_token(self) -> dict[str, NDArray[Any]]:
        """The arrays `[n, S]` that a model and its losses are given, by name."""
        names = ("tokens", "labels", "loss_mask", "position_ids", "members", "label_roles")
        arrays = {name: getattr(self, name) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}


@dataclass(frozen=True, eq=False)
class Marks:
    """What is known of the tokens of conversations, [n, S + 1] each.

    Attributes:
        known: bool [n], samples of conversations; in the others all tokens are trained on, and
            boundaries stand after end-of-document tokens.
        trained: bool, tokens that are predicted with a loss.
        first: bool, first tokens of conversations and of members of pairs.
        roles: uint8, of members of pairs; 0 elsewhere.
    """

    known: NDArray[np.bool_]
    trained: NDArray[np.bool_]
    first: NDArray[np.bool_]
    roles: NDArray[np.uint8]

    @staticmethod
    def none(count: int, size: int) -> Marks:
        """Of samples none of which is known to be of conversations."""
        trained = np.ones((count, size), dtype=bool)
        roles = np.zeros((count, size), dtype=np.uint8)
        return Marks(np.zeros(count, dtype=bool), trained, ~trained, roles)

    def set(self, rows: NDArray[np.intp], marks: NDArray[np.uint8], loss_on: LossOn) -> None:
        """Set the samples `rows` from their loss marks, uint8 [rows, S + 1]."""
        self.known[rows] = True
        self.trained[rows] = trained(marks, loss_on)
        self.first[rows] = (marks & FIRST) != 0
        self.roles[rows] = marks & ROLES


def make_batch(
    windows: NDArray[Any],
    stream: NDArray[np.int32],
    positions: NDArray[np.int64],
    *,
    lengths: NDArray[np.int64] | None = None,
    marks: Marks | None = None,
    eod_id: int | None = None,
    reset_at_eod: bool = False,
    mask_eod_loss: bool = False,
) -> Batch:
    """A batch from windows of S + 1 tokens (any integer type, [n, S + 1]).

    Args:
        stream, positions: [n], see `Batch`.
        lengths: int64 [n], tokens of each window that are real; labels after them are masked.
        marks: of samples of conversations.
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
    if ends is not None and marks is not None:
        ends &= ~marks.known[:, None]
    if mask_eod_loss:
        loss_mask[ends] = 0.0
    if marks is not None:
        loss_mask[~marks.trained[:, 1:]] = 0.0
    position_ids = np.empty((count, size), dtype=np.int64)
    position_ids[:] = np.arange(size, dtype=np.int64)
    segments = None
    if reset_at_eod:
        assert ends is not None
        opens = np.zeros((count, size), dtype=bool)
        opens[:, 1:] = ends[:, :-1]
        if marks is not None:
            opens[:, 1:] |= marks.first[:, 1:-1]
        segments = np.cumsum(opens, axis=1, dtype=np.int32)
        position_ids -= np.maximum.accumulate(np.where(opens, position_ids, 0), axis=1)
    members = roles = label_roles = None
    if marks is not None and marks.roles.any():
        # Nothing stands before a first token.
        label_roles = np.where(marks.first, np.uint8(0), marks.roles)[:, 1:].copy()
        if segments is not None:
            members, roles = _members(marks.roles[:, :-1], segments)
    return Batch(
        tokens,
        labels,
        loss_mask,
        position_ids,
        stream,
        segments,
        digest(tokens, labels, positions),
        members,
        roles,
        label_roles,
    )


def _members(
    roles: NDArray[np.uint8], segments: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """`Batch.members` and `Batch.roles`, of the roles of tokens."""
    inside = roles.reshape(-1) != 0
    rows = np.repeat(np.arange(len(segments)), segments.shape[1])
    places = np.stack([rows, segments.reshape(-1)], axis=1)[inside]
    opens = np.ones(len(places), dtype=bool)
    opens[1:] = (places[1:] != places[:-1]).any(axis=1)
    members = np.zeros(roles.size, dtype=np.int32)
    members[inside] = np.cumsum(opens)
    return members.reshape(roles.shape), roles.reshape(-1)[inside][opens]


def digest(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], positions: NDArray[np.int64]
) -> int:
    """See `Batch.digest`. The hash of a sample is multilinear (sum of token j x random 64-bit
    constant j, modulo 2^64; Carter and Wegman 1979), mixed with its position. Two samples of ids
    below 2^17 collide with a probability of at most 2^-47."""
    factors = _factors(tokens.shape[1] + 1)
    with np.errstate(over="ignore"):
        hashes = (tokens @ factors[:-1] + labels[:, -1] * factors[-1]).astype(np.uint64)
        return int(uniform_bits(hashes, positions).sum(dtype=np.uint64)) if len(hashes) else 0


@lru_cache(maxsize=16)
def _factors(count: int) -> NDArray[np.int64]:
    return uniform_bits(make_key(0, "digest"), np.arange(count)).astype(np.int64)
