"""What tokens of conversations and pairs are: a second dataset `PREFIX.loss` beside PREFIX.

It is an IndexedDataset of uint8 with the same documents as PREFIX: one number a token, the sum of

    1  an assistant's turn, the token that ends it too
    2  the last of these turns
    4  the first token of a conversation, or of a member of a pair
    8  a pair's query
   16  a candidate that is equivalent to it
   32  another candidate

A document is a conversation or a pair. It need not end with an end-of-document token, and tokens
inside may be one, so boundaries come from the marks. The end-of-document tokens between the members
of a pair belong to none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.indexed import LOSS_ENDINGS, Shard, open_shard, with_ending
from megacode.errors import UserError
from megacode.recipe.schema import LossOn

ANSWER, LAST_ANSWER, FIRST = 1, 2, 4
QUERY, EQUIVALENT, OTHER = 8, 16, 32
ROLES = QUERY | EQUIVALENT | OTHER
MARKS = 64
"""All marks are below this."""
_BITS: dict[LossOn, int] = {
    "all": 0,
    "answers": ANSWER,
    "last_answer": LAST_ANSWER,
    "query": QUERY,
    "equivalent": QUERY | EQUIVALENT,
}
_SHIFT = 24
"""Ids have fewer bits."""


def loss_prefix(prefix: Path) -> Path:
    """`corpus/chat` -> `corpus/chat.loss`."""
    return with_ending(prefix, ".loss")


def has_marks(prefix: Path) -> bool:
    """Whether a dataset has loss marks beside it."""
    return any(with_ending(prefix, ending).exists() for ending in LOSS_ENDINGS)


def open_marks(shard: Shard, label: str = "dataset") -> Shard:
    """The marks of a shard. UserError, beginning with `label`: they are not of its tokens."""
    marks = open_shard(loss_prefix(shard.prefix), label)
    if (marks.tokens, marks.documents) != (shard.tokens, shard.documents):
        raise UserError(
            f"{label}: {marks.idx_path} has {marks.tokens:,} tokens in {marks.documents:,} "
            f"documents and {shard.idx_path.name} {shard.tokens:,} in {shard.documents:,}: one of "
            "the two is from another run; tokenize the source again"
        )
    return marks


def trained(marks: NDArray[np.uint8], loss_on: LossOn) -> NDArray[np.bool_]:
    """Whether each token is predicted with a loss. No first token is: nothing stands before it."""
    first = (marks & FIRST) != 0
    return ~first if loss_on == "all" else ((marks & _BITS[loss_on]) != 0) & ~first


def join(ids: NDArray[Any], marks: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Ids with their marks in the upper byte."""
    return ids.astype(np.uint32) | (marks.astype(np.uint32) << np.uint32(_SHIFT))


def split(joined: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Undoes `join`."""
    return joined & np.uint32((1 << _SHIFT) - 1), (joined >> np.uint32(_SHIFT)).astype(np.uint8)
