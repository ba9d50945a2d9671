"""Fill-in-the-middle at document level (arXiv 2207.14255, section 3; StarCoder, arXiv 2305.06161).

The document is rearranged whole, and samples show the rearranged one: prefix, suffix and middle may be as far
apart as the document is long, and a sample may show a middle whose prefix stands in another one.
`megacode.data.fim` says how a document is rearranged. Its draws are keyed by (seed, stream, epoch, document),
so every sample of an epoch shows the same rearranged document. Which samples there are does not change (nothing
is laid out anew), so any step can be read alone:

* Of a document with n tokens, rearranged to n' (three control tokens more, and a few by encoding again at the
  cuts), a sample that shows tokens [first, last) shows the rearranged tokens [first, last), and [first, n') if
  last = n: what a document grew by stands in the sample in which it ends.
* The sample is then cut to its length: about as many tokens as the documents that end in it grew by are lost at
  its end, as at context level. In a document that goes on in the next sample these are a gap. A document that
  got shorter, or a sample with room, is padded, and padding has no loss.
* The last token of a window is there as a label only, and is the next window's first input (as without all
  this). No other token is shown twice.
* A document longer than `MAX_WINDOWS` sequences is left as it is: every sample of it would read and rearrange
  all of it.

Each sample reads every chosen document that it touches, whole, and encodes again what is near the cuts
(`megacode.data.fim_near`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megacode.data.fim import Fim, rearrange_rows, write_sample
from megacode.data.permute import uniform_bits
from megacode.data.source import DocumentPart

MAX_WINDOWS = 64
"""Sequences in the longest document that is rearranged."""


def rearrange_documents(
    fim: Fim,
    samples: Sequence[Sequence[DocumentPart]],
    length: int,
    *,
    keys: NDArray[np.uint64],
    rates: NDArray[np.float64],
    packed: NDArray[np.bool_],
    read: Callable[[int, int, int], NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of documents that were rearranged whole.

    Args:
        samples: the parts of documents that each of n samples shows.
        length: of a sample with its last label, S + 1.
        keys, rates: uint64 [n] (of seed, stream and epoch) and float64 [n].
        packed: bool [n], samples that are packs: the last part of any other ends with the window's last label.
        read: (sample, start, tokens) -> that many tokens of the sample's source from token `start` on, int64 [tokens].

    Returns:
        int64 [n, length], and how many of the tokens are real, int64 [n]; the rest is `fim.pad`.
    """
    shown = [(number, part) for number, parts in enumerate(samples) for part in parts]
    sample = [number for number, _ in shown]
    fits = np.array([part.document.tokens <= MAX_WINDOWS * (length - 1) for _, part in shown])
    rows = [
        read(number, part.document.start, part.document.tokens)
        if whole
        else read(number, part.document.start + part.first, part.tokens)
        for (number, part), whole in zip(shown, fits, strict=True)
    ]
    row_keys = uniform_bits(keys[sample], [part.document.start for _, part in shown])
    row_rates = np.where(fits, rates[sample], 0.0)
    rearranged = rearrange_rows(fim, rows, row_keys, row_rates, ["none"] * len(rows))
    documents = zip(rows, rearranged, strict=True)
    out = np.empty((len(samples), length), dtype=np.int64)
    lengths = np.empty(len(samples), dtype=np.int64)
    for number, parts in enumerate(samples):
        ids: list[int] = []
        for place, part in enumerate(parts):
            row, new = next(documents)
            stop: int | None = part.first + part.tokens
            if new is None:
                begin = part.first if len(row) == part.document.tokens else 0
                ids += row[begin : begin + part.tokens].tolist()
                continue
            if part.ends and (packed[number] or place < len(parts) - 1):
                stop = None
            ids += new[part.first : stop]
        lengths[number] = write_sample(out[number], ids, fim.pad)
    return out, lengths
