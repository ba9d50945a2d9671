"""What each way of packing loses: documents cut, tokens never shown, padding. For the plan.

From the documents' lengths alone: exact for sources of up to `MEASURED` documents, else from four
stretches, evenly spread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megacode.data.best_fit import pack_documents
from megacode.data.fim_document import MAX_WINDOWS
from megacode.data.source import TokenSource, has_data, open_source
from megacode.plan.plan import Plan
from megacode.plan.streams import StreamPlan
from megacode.recipe.schema import Packing

MEASURED = 1 << 18
_STRETCHES = 4


@dataclass(frozen=True)
class PackingLosses:
    """One source at one sequence length.

    Attributes:
        measured: documents that were looked at, of `documents`.
        cut: share of the documents that no sample shows whole, by way of packing.
        lost: share of tokens that no sample shows (`concatenate`: the rest behind the last window).
        padding: share of padding in the samples of `best_fit`.
        giant: share of tokens in documents that document-level fill-in-the-middle leaves as they
            are; None where no phase uses it.
    """

    source: str
    sequence_length: int
    packing: Packing
    documents: int
    measured: int
    cut: dict[Packing, float]
    lost: float
    padding: float
    giant: float | None


def packing_losses(plan: Plan) -> list[PackingLosses]:
    """For every source of a plan whose data is there, and every sequence length it is read at."""
    losses: dict[tuple[str, int], PackingLosses] = {}
    streams = [stream for phase in plan.phases for stream in phase.streams]
    by_document = {s.source for s in streams if s.fim_rate and s.fim_level == "document"}
    for stream in streams:
        key, given = (stream.source, stream.sequence_length), plan.recipe.sources[stream.source]
        if key not in losses and has_data(given):
            source = open_source(stream.source, given.paths)
            losses[key] = _measure(source, stream, stream.source in by_document)
    return list(losses.values())


def _measure(source: TokenSource, stream: StreamPlan, by_document: bool) -> PackingLosses:
    length = stream.sequence_length
    measured = shown = cut = longer = tokens = packs = giant = 0
    for edges in _stretches(source):
        start, end, size = edges[:-1], edges[1:], np.diff(edges)
        measured += len(size)
        shown += int((size > 0).sum())
        cut += int((end > start // length * length + length + 1)[size > 0].sum())
        longer += int((size > length + 1).sum())
        tokens += int(size.sum())
        packs += len(pack_documents(start, size, length + 1))
        giant += int(size[size > MAX_WINDOWS * length].sum())
    unit = stream.window if stream.packing == "concatenate" else length
    return PackingLosses(
        source=source.name,
        sequence_length=length,
        packing=stream.packing,
        documents=source.documents,
        measured=measured,
        cut={"concatenate": cut / max(shown, 1), "best_fit": longer / max(shown, 1)},
        lost=((source.tokens - 1) % unit) / source.tokens,
        padding=1 - tokens / max(packs * (length + 1), 1),
        giant=giant / max(tokens, 1) if by_document else None,
    )


def _stretches(source: TokenSource) -> Iterator[NDArray[np.int64]]:
    """Of each stretch: where its documents begin in the source, and where the last one ends.

    int64 [documents + 1]. A stretch is a shard, or in a large source a part of one.
    """
    firsts = list(accumulate((shard.documents for shard in source.shards), initial=0))
    tokens = list(accumulate((shard.tokens for shard in source.shards), initial=0))
    size, total = MEASURED, firsts[-1]
    starts = sorted({first for first in firsts if first < total})
    if total > MEASURED:
        size = MEASURED // _STRETCHES
        starts = np.linspace(0, total - size, _STRETCHES).astype(int).tolist()
    for start in starts:
        number = bisect_right(firsts, start) - 1
        shard, low = source.shards[number], start - firsts[number]
        yield shard.token_edges(low, min(low + size, shard.documents)) + tokens[number]


def packing_line(losses: Sequence[PackingLosses]) -> str:
    """One line for the start of a run, over all sources, weighted by their documents."""
    total = sum(one.documents for one in losses) or 1

    def mean(values: Iterable[float]) -> str:
        shares = (value * one.documents for value, one in zip(values, losses, strict=True))
        share = 100 * sum(shares) / total
        return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"

    used = " and ".join(dict.fromkeys(one.packing for one in losses))
    cut = {key: mean(one.cut[key] for one in losses) for key in ("concatenate", "best_fit")}
    return (
        f"packing: {used} (concatenate cuts {cut['concatenate']} of the documents; best_fit cuts "
        f"{cut['best_fit']} and pads {mean(one.padding for one in losses)})"
    )
