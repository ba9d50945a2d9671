"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255) on rows of tokens.

A row is split at end-of-document tokens into documents. Each is, with its stream's rate, decoded,
cut at two uniformly drawn character positions into prefix, middle and suffix, encoded again and
written as one of:

    PSM:  <prefix> prefix <suffix> suffix <middle> middle
    SPM:  <prefix> <suffix> suffix <middle> prefix middle       (with probability `spm_rate`)

At context level (Crystal, arXiv 2411.04156) a row is a sample: a window of tokens, or a pack. It is
then cut to its length, or padded. At document level a row is a whole document
(`megacode.data.fim_document`). What implementations leave open is decided so:

* Draws are hashes of (seed, stream, epoch, sample or document, number of the document in the row).
  They replay on resume and in every layout, and differ from epoch to epoch.
* A leading begin-of-sequence token and the end-of-document token stay where they are. Other control
  tokens in a document (file names, chat turns) move with the text around them, as one character
  each. Text never becomes a control token.
* Where the sample's edge cuts a document inside a character (tokenizers with bytes), the tokens of
  the broken character stay at the edge; the rest is rearranged.
* A document that decoding and encoding would otherwise damage (bytes that are no UTF-8) is left as
  it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from megacode.data.fim_near import Piece, Pieces, TokenTexts, near_pieces, token_texts
from megacode.data.permute import uniform_below, uniform_bits
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer

_BROKEN = "\ufffd"
_MAX_BROKEN_TOKENS = 3
"""A UTF-8 character has at most four bytes, so a cut one leaves at most three tokens."""


@dataclass(frozen=True, eq=False)
class Fim:
    """Control tokens and settings of one recipe.

    Attributes:
        control: bool [vocab_size + 1], ids that are no text; the last is for all ids above.
    """

    tokenizer: Tokenizer
    prefix: int
    middle: int
    suffix: int
    pad: int
    eod: int
    bos: int | None
    spm_rate: float
    control: NDArray[np.bool_]

    def decode(self, ids: list[int]) -> str:
        """Text of ids without control tokens, by the vocabulary's own unchecked decoder."""
        return self.tokenizer.base.decode(ids)

    @cached_property
    def texts(self) -> TokenTexts:
        """How many characters each id is: one pass over the vocabulary, made when first needed."""
        anchor = self.tokenizer.encode("x")[-1]
        return token_texts(self.tokenizer.base.size, self.decode, anchor, self.control)


def make_fim(settings: schema.FimSection, tokenizer: Tokenizer) -> Fim:
    """UserError if the tokenizer lacks one of the four control tokens."""
    ids = {}
    for key in ("prefix", "middle", "suffix", "pad"):
        try:
            ids[key] = tokenizer.token_id(getattr(settings, key))
        except UserError as error:
            raise UserError(f"data.fim.{key}: {error}") from None
    eod, bos = tokenizer.eod_id, tokenizer.base.bos_id
    control = np.zeros(tokenizer.vocab_size + 1, dtype=bool)
    control[[*tokenizer.control_tokens.values(), *ids.values(), eod, -1]] = True
    return Fim(tokenizer, **ids, eod=eod, bos=bos, spm_rate=settings.spm_rate, control=control)


def rearrange(
    fim: Fim,
    windows: NDArray[np.int64],
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    lengths: NDArray[np.int64],
    packed: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fill-in-the-middle on windows [n, L], with a key and a rate for each [n].

    Args:
        lengths: tokens of each window that are real, int64 [n].
        packed: bool [n], windows in which any document may be a part, not only the outer two.

    Returns:
        Windows int64 [n, L], and how many of their tokens are real, int64 [n]. The rest of a
        rearranged window is `fim.pad`. Windows with rate 0 come back as they are.
    """
    chosen = np.flatnonzero(rates > 0).tolist()
    rows = [windows[row, : lengths[row]] for row in chosen]
    edges = ["every" if packed[row] else "outer" for row in chosen]
    rearranged = rearrange_rows(fim, rows, keys[chosen], rates[chosen], edges)
    windows, lengths = windows.copy(), lengths.copy()
    for row, ids in zip(chosen, rearranged, strict=True):
        if ids is not None:
            lengths[row] = write_sample(windows[row], ids, fim.pad)
    return windows, lengths


def write_sample(out: NDArray[np.int64], ids: list[int], pad: int) -> int:
    """Fill `out` with `ids`, cut to its length or padded; how many tokens are real."""
    count = min(len(ids), len(out))
    out[:count], out[count:] = ids[:count], pad
    return count


def rearrange_rows(
    fim: Fim,
    rows: Sequence[NDArray[np.int64]],
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    edges: Sequence[str],
) -> list[list[int] | None]:
    """Fill-in-the-middle on rows of any length, neither cut nor padded; None for an unchanged row.

    Args:
        edges: of each row, where documents may begin or end inside a character: `outer` (the row's
            own ends), `every` (any document's ends) or `none`. Rows with `none` are whole
            documents, of which only what is near the cuts is encoded again
            (`megacode.data.fim_near`).
    """
    plans = [
        _plan_row(fim, row, int(key), float(rate), edge)
        for row, key, rate, edge in zip(rows, keys, rates, edges, strict=True)
    ]
    texts = [part for plan in plans for part in plan if isinstance(part, str)]
    encoded = iter(fim.tokenizer.encode_batch(texts) if texts else [])
    return [
        list(chain.from_iterable(next(encoded) if isinstance(part, str) else part for part in plan))
        if plan
        else None
        for plan in plans
    ]


def _plan_row(fim: Fim, row: NDArray[np.int64], key: int, rate: float, edges: str) -> Piece:
    """The rearranged row as texts to encode and tokens to keep; empty if it stays as it is."""
    ends = [*np.flatnonzero(row == fim.eod).tolist(), len(row)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    # Four draws a document: whether, suffix first, and two cuts.
    bits = uniform_bits(key, np.arange(4 * len(starts))).reshape(-1, 4)
    chance = (bits[:, :2] >> np.uint64(11)) * 2.0**-53
    controls = fim.control[np.minimum(row, len(fim.control) - 1)]
    plan: Piece = []
    done = 0
    for number in np.flatnonzero(chance[:, 0] < rate).tolist():
        start, end = starts[number], ends[number]
        cut_left = edges == "every" or (edges == "outer" and start == 0)
        cut_right = edges == "every" or (edges == "outer" and end == len(row))
        if start < end and row[start] == fim.bos:
            start, cut_left = start + 1, False
        ids, control, cuts = row[start:end], controls[start:end], partial(_cuts, bits[number, 2:])
        near = None
        if edges == "none" and not control.any():
            near = near_pieces(fim.texts, fim.decode, ids, cuts)
        if near:
            prefix, middle, suffix = near
        else:
            document = _decode(fim, ids, control, cut_left, cut_right)
            if document is None:
                continue
            parts, left, right = document
            start, end = start + left, end - right
            size = sum(map(len, parts))
            prefix, middle, suffix = _split(parts, [0, *cuts(size), size])
        plan.append(row[done:start].tolist())
        if chance[number, 1] < fim.spm_rate:
            plan += [[fim.prefix, fim.suffix], *suffix, [fim.middle], *prefix, *middle]
        else:
            plan += [[fim.prefix], *prefix, [fim.suffix], *suffix, [fim.middle], *middle]
        done = end
    return [*plan, row[done:].tolist()] if plan else []


def _decode(
    fim: Fim, ids: NDArray[np.int64], controls: NDArray[np.bool_], cut_left: bool, cut_right: bool
) -> tuple[Piece, int, int] | None:
    """A document as texts and control tokens, and how many tokens stay at its left and right edge.

    None: it is left as it is.
    """
    parts: Piece = []
    left = right = 0
    bounds = np.flatnonzero(controls[1:] | controls[:-1]) + 1  # every control token is a run
    for first, stop in pairwise([0, *bounds.tolist(), len(ids)]):
        run = ids[first:stop].tolist()
        if not run or controls[first]:
            parts.append(run)
            continue
        text = fim.decode(run)
        if _BROKEN in text:
            if cut_left and first == 0:
                shorter = [run[k:] for k in range(_MAX_BROKEN_TOKENS + 1)]
                left = _broken(fim, shorter, str.startswith)
                run = run[left:]
            if cut_right and stop == len(ids):
                shorter = [run[: len(run) - k] for k in range(_MAX_BROKEN_TOKENS + 1)]
                right = _broken(fim, shorter, str.endswith)
                run = run[: len(run) - right]
            text = fim.decode(run)
            # U+FFFD may also stand in the corpus: then encoding gives the same ids back.
            if _BROKEN in text and fim.tokenizer.encode(text) != run:
                return None
        parts.append(text)
    return (parts, left, right) if any(parts) else None


def _broken(fim: Fim, shorter: list[list[int]], at_edge: Callable[[str, str], bool]) -> int:
    """Tokens to drop until the edge is a whole character; 0 for a real U+FFFD."""
    whole = (k for k, ids in enumerate(shorter) if not at_edge(fim.decode(ids), _BROKEN))
    return next(whole, 0)


def _cuts(bits: NDArray[np.uint64], size: int) -> list[int]:
    """Two places from 0 to `size`, in order."""
    return sorted(uniform_below(bits, size + 1).tolist())


def _split(parts: Piece, cuts: list[int]) -> Pieces:
    """What lies between each two of `cuts` (in characters; a control token counts as one)."""
    pieces: Pieces = ([], [], [])
    position = 0
    for part in parts:
        for piece, (low, high) in zip(pieces, pairwise(cuts), strict=True):
            if inside := part[max(low - position, 0) : max(high - position, 0)]:
                piece.append(inside)
        position += len(part)
    return pieces
