"""Fill-in-the-middle of a long document that encodes only what lies near the cuts.

A piece of a document (prefix, middle, suffix) is encoded as if it were a text of its own. Away from
its cut edge that gives the tokens that the document already has there: tokenizers split text at
words first, or merge within a few characters. So the text between a cut and a word at least
`MARGIN` tokens away is encoded, and beyond that word the document's tokens are kept. The text of a
piece is always exact. Its tokens are those of encoding it whole unless the tokenizer lets a merge
reach over `MARGIN` tokens and past the beginning of a word.

Cuts are places between characters, so the number of characters of each token must be known. A table
has it for every id whose text does not depend on its neighbours. A document with other ids (parts
of characters) is decoded and encoded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MARGIN = 24
"""Tokens beside a cut that are encoded again."""

MIN_TOKENS = 8 * MARGIN
"""Shorter documents are encoded whole: there is little to save."""

Piece = list[str | list[int]]
"""Texts to encode and tokens to keep, in order."""

Pieces = tuple[Piece, Piece, Piece]
"""Prefix, middle, suffix."""

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """What each id of a vocabulary is.

    Attributes:
        characters: int32 [ids], characters that it adds to a text; -1: its neighbours matter.
        word: bool [ids], whether it begins a word: a space and a character that is none.
    """

    characters: NDArray[np.int32]
    word: NDArray[np.bool_]


def token_texts(size: int, decode: Decode, anchor: int, skip: NDArray[np.bool_]) -> TokenTexts:
    """The table of a vocabulary of `size` ids: what each adds behind the token `anchor`.

    `skip`: bool [at least size], ids that are no text.
    """
    characters, word = np.full(size, -1, dtype=np.int32), np.zeros(size, dtype=bool)
    before = decode([anchor])
    for token in np.flatnonzero(~skip[:size]).tolist():
        text = decode([anchor, token])
        if text.startswith(before) and len(text) > len(before) and "\ufffd" not in text:
            added = text[len(before) :]
            characters[token] = len(added)
            word[token] = len(added) > 1 and added[0] == " " and not added[1].isspace()
    return TokenTexts(characters, word)


def near_pieces(
    table: TokenTexts,
    decode: Decode,
    ids: NDArray[np.int64],
    draw: Callable[[int], Sequence[int]],
) -> Pieces | None:
    """Prefix, middle and suffix of a document of text tokens; None: decode and encode all of it.

    Args:
        draw: number of characters -> the two cuts, in order.
    """
    if len(ids) < MIN_TOKENS or int(ids.max()) >= len(table.characters):
        return None
    characters = table.characters[ids]
    if int(characters.min()) < 0:
        return None
    # Some tokenizers begin every text with a space that decoding drops: not one of the characters.
    dropped = int(characters[0]) - len(decode([int(ids[0])]))
    if dropped not in (0, 1):
        return None
    ends, words = np.cumsum(characters, dtype=np.int64), np.flatnonzero(table.word[ids])
    document, total = _Document(ids, ends, words, decode), int(ends[-1])
    low, high = (cut + dropped for cut in draw(total - dropped))
    try:
        prefix = document.piece(0, low) if low > dropped else []
        return prefix, document.piece(low, high), document.piece(high, total)
    except _Irregular:
        return None


class _Irregular(Exception):
    """Tokens together have not the text that the table says."""


@dataclass(frozen=True, eq=False)
class _Document:
    """`ends`: characters up to the end of each token; `words`: tokens that begin a word."""

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    words: NDArray[np.int64]
    decode: Decode

    def piece(self, low: int, high: int) -> Piece:
        """Characters [low, high) as texts to encode and tokens to keep."""
        if low == high:
            return []
        cut_left, cut_right = low > 0, high < int(self.ends[-1])
        first, last = (int(i) for i in np.searchsorted(self.ends, (low, high - 1), side="right"))
        keep_from, keep_to = 0, len(self.ids)
        if cut_left:
            at = int(np.searchsorted(self.words, first + 1 + MARGIN))
            keep_from = int(self.words[at]) if at < len(self.words) else len(self.ids)
        if cut_right:
            at = int(np.searchsorted(self.words, last - MARGIN, side="right")) - 1
            keep_to = int(self.words[at]) if at >= 0 else 0
        if keep_from >= keep_to:
            text = self._text(first, last + 1, whole=cut_left)
            # Without a cut on its left the text begins where the document does.
            begin = low - self._start(first) if cut_left else 0
            return [text[begin : len(text) - (int(self.ends[last]) - high)]]
        parts: Piece = []
        if cut_left:
            parts.append(self._text(first, keep_from, whole=True)[low - self._start(first) :])
        parts.append(self.ids[keep_from:keep_to].tolist())
        if cut_right:
            text = self._text(keep_to, last + 1, whole=False)
            parts.append(text[: len(text) - (int(self.ends[last]) - high)])
        return parts

    def _start(self, token: int) -> int:
        return int(self.ends[token - 1]) if token else 0

    def _text(self, first: int, stop: int, whole: bool) -> str:
        """Text of tokens [first, stop).

        `whole`: with the space that decoding drops at the beginning (and encoding adds).
        """
        text = self.decode(self.ids[first:stop].tolist())
        dropped = int(self.ends[stop - 1]) - self._start(first) - len(text)
        if dropped not in (0, 1):
            raise _Irregular
        return " " * dropped + text if whole else text
