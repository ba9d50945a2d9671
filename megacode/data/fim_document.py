"""Fill-in-the-middle at document level (arXiv 2207.14255, section 3; StarCoder, arXiv 2305.06161).

The whole document is rearranged (`megacode.data.fim` says how), and samples show the result.
Prefix, suffix and middle may be as far apart as the document is long, and a sample may show a
middle whose prefix is in another sample. Draws are keyed by (seed, stream, epoch, document), so
every sample of an epoch shows the same rearranged document. Which samples there are does not
change, so any step can be read alone:

* A document has n tokens, and n' when rearranged (three control tokens more, and a few by encoding
  again at the cuts). A sample that shows tokens [first, last) of it shows the rearranged tokens
  [first, last), and [first, n') if last = n: the sample in which the document ends has the growth.
* The sample is then cut to its length. About as many tokens are lost at its end as the documents
  that end in it grew by. In a document that goes on in the next sample these are a gap. A sample
  with room (a document got shorter, or a pack was not full) is padded, and padding has no loss.
* The last token of a window is there as a label only, and is the next window's first input. No
  other token is shown twice.
* A document longer than `MAX_WINDOWS` sequences is left as it is: every sample of it would have to
  read and rearrange all of it.

Each sample reads every chosen document that it touches, whole, and encodes again what is near the
cuts (`megacode.data.fim_near`).
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
        packed: bool [n], samples that are packs. The last part of any other ends with a label.
        read: (sample, start, tokens) -> int64 tokens [start, start + tokens) of its source.

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
