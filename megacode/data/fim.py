"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): documents rearranged, at context level (Crystal, arXiv 2411.04156).

A row of tokens is split at end-of-document tokens into documents. Each is, with its stream's rate, decoded, cut at
two uniformly drawn character positions into prefix, middle and suffix, encoded again, and written as

    PSM:  <prefix> prefix <suffix> suffix <middle> middle
    SPM:  <prefix> <suffix> suffix <middle> prefix middle       (with probability `spm_rate`)

At context level a row is a sample: a window of tokens, or a pack. It is then cut to its length, or padded. At document
level a row is a whole document (`megacode.data.fim_document`). What the usual implementations leave open is decided thus:

* Draws are hashes of (seed, stream, epoch, sample or document, number of the document in the row). They replay on
  resume and in every layout, and differ from epoch to epoch.
* A leading begin-of-sequence token and the end-of-document token stay where they are. Other control tokens in a
  document (file names, chat turns) move with the text around them, as one character each; text never becomes one.
* A document that the sample's edge cuts in the middle of a character (tokenizers with bytes) keeps the tokens of that
  broken character at the edge; the rest is rearranged.
* A document that decoding and encoding would damage otherwise (bytes that are no UTF-8) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

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
    """The tokens and rates of one recipe. `control` is bool [vocab_size + 1]: ids that are no text (last: ids beyond)."""

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
        """Text of ids of which none is a control token: the vocabulary's own decoder, without looking at each id."""
        return self.tokenizer.base.decode(ids)

    @cached_property
    def texts(self) -> TokenTexts:
        """How many characters each id is; a pass over the vocabulary, made when first needed."""
        anchor = self.tokenizer.encode_batch(["x"])[0][-1]
        return token_texts(self.tokenizer.base.size, self.decode, anchor, self.control)


def make_fim(settings: schema.FimSection, tokenizer: Tokenizer) -> Fim:
    """UserError if the tokenizer lacks one of the four control tokens."""
    names = {key: getattr(settings, key) for key in ("prefix", "middle", "suffix", "pad")}
    ids = {}
    for key, name in names.items():
        try:
            ids[key] = tokenizer.token_id(name)
        except UserError as error:
            raise UserError(f"data.fim.{key}: {error}") from None
    control = np.zeros(tokenizer.vocab_size + 1, dtype=bool)
    control[[*tokenizer.control_tokens.values(), *ids.values(), tokenizer.eod_id, -1]] = True
    try:
        bos = tokenizer.bos_id
    except UserError:  # a tokenizer without one
        bos = None
    return Fim(
        tokenizer, **ids, eod=tokenizer.eod_id, bos=bos, spm_rate=settings.spm_rate, control=control
    )


@dataclass(frozen=True)
class _Rearranged:
    """A document to be written anew: tokens [start, end) of its row, of which `before` and `after` stay at the edges.

    `pieces`: prefix, middle, suffix.
    """

    start: int
    end: int
    before: int
    after: int
    suffix_first: bool
    pieces: Pieces


def rearrange(
    fim: Fim,
    windows: NDArray[np.int64],
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    lengths: NDArray[np.int64] | None = None,
    packed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fill-in-the-middle on windows [n, L], with a key and a rate for each [n].

    Args:
        lengths: tokens of each window that are real, int64 [n]; default: all.
        packed: bool [n], windows in which any document may be a part of one, not only the first and the last.

    Returns:
        Windows int64 [n, L], and how many of their tokens are real, int64 [n]; in a window that was rearranged the rest is
        `fim.pad`. Windows with rate 0 come back as they are.
    """
    length = windows.shape[1]
    out = windows.copy()
    lengths = np.full(len(windows), length, dtype=np.int64) if lengths is None else lengths.copy()
    chosen = np.flatnonzero(rates > 0).tolist()
    rows = [windows[row, : lengths[row]] for row in chosen]
    edges = ["every" if packed is not None and packed[row] else "outer" for row in chosen]
    rearranged = rearrange_rows(fim, rows, keys[chosen], rates[chosen], edges)
    for row, ids in zip(chosen, rearranged, strict=True):
        if ids is not None:
            lengths[row] = min(len(ids), length)
            out[row] = fim.pad
            out[row, : lengths[row]] = ids[:length]
    return out, lengths


def rearrange_rows(
    fim: Fim,
    rows: Sequence[NDArray[np.int64]],
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    edges: Sequence[str],
) -> list[list[int] | None]:
    """Fill-in-the-middle on rows of any length, neither cut nor padded; None for a row of which nothing moves.

    Args:
        edges: where a document of the row may begin or end inside a character: `outer` (the row's own ends), `every`
            (any document's ends) or `none`: rows of whole documents, of which only what is near the cuts is encoded again
            (`megacode.data.fim_near`).
    """
    texts: list[str] = []
    plans = [
        _plan_row(fim, row, int(key), float(rate), texts, edge)
        for row, key, rate, edge in zip(rows, keys, rates, edges, strict=True)
    ]
    encoded = fim.tokenizer.encode_batch(texts) if texts else []
    return [
        _write_row(fim, row.tolist(), documents, encoded) if documents else None
        for row, documents in zip(rows, plans, strict=True)
    ]


def _plan_row(
    fim: Fim, row: NDArray[np.int64], key: int, rate: float, texts: list[str], edges: str
) -> list[_Rearranged]:
    """Draws for every document of one row; appends the texts that are to be encoded."""
    ends = np.flatnonzero(row == fim.eod).tolist()
    starts = [0, *(end + 1 for end in ends)]
    ends.append(len(row))
    # Four draws a document: whether, suffix first, and two cuts.
    bits = uniform_bits(key, np.arange(4 * len(starts))).reshape(-1, 4)
    chance = (bits[:, :2] >> np.uint64(11)) * 2.0**-53
    chosen = chance[:, 0] < rate
    controls = fim.control[np.minimum(row, len(fim.control) - 1)]
    documents = []

    def cuts(number: int, size: int) -> list[int]:
        return sorted(uniform_below(bits[number, 2:], size + 1).tolist())

    for number in np.flatnonzero(chosen).tolist():
        start, end = starts[number], ends[number]
        before = int(start < end and int(row[start]) == fim.bos)
        suffix_first = bool(chance[number, 1] < fim.spm_rate)
        if edges == "none" and not controls[start + before : end].any():
            near = near_pieces(
                fim.texts, fim.decode, row[start + before : end], partial(cuts, number), texts
            )
            if near is not None:
                documents.append(_Rearranged(start, end, before, 0, suffix_first, near))
                continue
        runs = _runs(row[start + before : end], controls[start + before : end])
        cut_left = not before and (edges == "every" or (edges == "outer" and start == 0))
        cut_right = edges == "every" or (edges == "outer" and end == len(row))
        document = _decode(fim, runs, cut_left, cut_right)
        if document is None:
            continue
        atoms, left, right = document
        size = sum(1 if isinstance(atom, int) else len(atom) for atom in atoms)
        pieces = _split(atoms, (0, *cuts(number, size), size), texts)
        documents.append(_Rearranged(start, end, before + left, right, suffix_first, pieces))
    return documents


def _runs(ids: NDArray[np.int64], controls: NDArray[np.bool_]) -> list[int | list[int]]:
    """A document as control ids (int) and runs of text tokens between them (list)."""
    where = np.flatnonzero(controls).tolist()
    if not where:
        return [ids.tolist()] if len(ids) else []
    runs: list[int | list[int]] = []
    previous = 0
    for place in where:
        if place > previous:
            runs.append(ids[previous:place].tolist())
        runs.append(int(ids[place]))
        previous = place + 1
    if previous < len(ids):
        runs.append(ids[previous:].tolist())
    return runs


def _decode(
    fim: Fim, runs: list[int | list[int]], cut_left: bool, cut_right: bool
) -> tuple[list[int | str], int, int] | None:
    """Runs as control ids and texts, and how many tokens stay at the left and the right edge. None: leave it all."""
    atoms: list[int | str] = []
    left = right = 0
    for place, run in enumerate(runs):
        if isinstance(run, int):
            atoms.append(run)
            continue
        ids, text = run, fim.decode(run)
        if _BROKEN in text:
            if cut_left and place == 0:
                left = _broken(
                    fim, [ids[k:] for k in range(_MAX_BROKEN_TOKENS + 1)], str.startswith
                )
                ids = ids[left:]
            if cut_right and place == len(runs) - 1:
                right = _broken(
                    fim, [ids[: len(ids) - k] for k in range(_MAX_BROKEN_TOKENS + 1)], str.endswith
                )
                ids = ids[: len(ids) - right]
            text = fim.decode(ids)
            # U+FFFD may also stand in the corpus itself; what matters is that nothing gets lost on the way.
            if _BROKEN in text and fim.tokenizer.encode_batch([text])[0] != ids:
                return None
        atoms.append(text)
    return (atoms, left, right) if any(atoms) or any(isinstance(a, int) for a in atoms) else None


def _broken(fim: Fim, shorter: list[list[int]], at_edge: Callable[[str, str], bool]) -> int:
    """How many tokens to drop until the edge is a whole character; 0 if that does not help (it is a real U+FFFD)."""
    for dropped, ids in enumerate(shorter):
        if not at_edge(fim.decode(ids), _BROKEN):
            return dropped
    return 0


def _split(atoms: list[int | str], cuts: tuple[int, ...], texts: list[str]) -> Pieces:
    """Atoms between each two of `cuts` (in characters; a control token counts as one)."""
    pieces: Pieces = ([], [], [])
    position = 0
    for atom in atoms:
        size = 1 if isinstance(atom, int) else len(atom)
        for piece, low, high in zip(pieces, cuts[:-1], cuts[1:], strict=True):
            if isinstance(atom, int):
                if low <= position < high:
                    piece.append(atom)
            elif part := atom[max(low - position, 0) : max(high - position, 0)]:
                texts.append(part)
                piece.append(-len(texts))
        position += size
    return pieces


def _write_row(
    fim: Fim, row: list[int], documents: list[_Rearranged], encoded: list[list[int]]
) -> list[int]:
    ids: list[int] = []
    done = 0
    for document in documents:
        ids += row[done : document.start + document.before]
        prefix, middle, suffix = (_ids(piece, encoded) for piece in document.pieces)
        if document.suffix_first:
            ids += [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix, *middle]
        else:
            ids += [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle, *middle]
        ids += row[document.end - document.after : document.end]
        done = document.end
    return ids + row[done:]


def _ids(piece: Piece, encoded: list[list[int]]) -> list[int]:
    ids: list[int] = []
    for atom in piece:
        if isinstance(atom, list):
            ids += atom
        elif atom >= 0:
            ids.append(atom)
        else:
            ids += encoded[-1 - atom]
    return ids
