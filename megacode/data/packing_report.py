"""What each way of packing loses: documents cut, tokens never shown, padding. To choose between them before the run.

From the documents' lengths alone: exact for sources of up to `MEASURED` documents (and for packs that are there), else from
four stretches of them, evenly spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacode.data.best_fit import pack_documents
from megacode.data.fim_document import MAX_WINDOWS
from megacode.data.source import TokenSource, has_data, open_source
from megacode.plan.plan import Plan, StreamPlan
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
        giant: share of tokens in documents that document-level fill-in-the-middle leaves as they are; None where no phase
            uses it.
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
    losses = {}
    by_document = {
        s.source
        for phase in plan.phases
        for s in phase.streams
        if s.fim_rate and s.fim_level == "document"
    }
    for phase in plan.phases:
        for stream in phase.streams:
            key, given = (stream.source, phase.sequence_length), plan.recipe.sources[stream.source]
            if key not in losses and has_data(given):
                source = open_source(stream.source, given.paths)
                losses[key] = _measure(source, stream, stream.source in by_document)
    return list(losses.values())


def _measure(source: TokenSource, stream: StreamPlan, by_document: bool) -> PackingLosses:
    length, stretches = stream.sequence_length, _documents(source)
    whole = cut = longer = tokens = packs = giant = 0
    for start, size in stretches:
        shown, end = size > 0, start + size
        whole += int(shown.sum())
        cut += int((end[shown] > start[shown] // length * length + length + 1).sum())
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
        measured=sum(len(size) for _, size in stretches),
        cut={"concatenate": cut / max(whole, 1), "best_fit": longer / max(whole, 1)},
        lost=((source.tokens - 1) % unit) / source.tokens,
        padding=1 - tokens / max(packs * (length + 1), 1),
        giant=giant / max(tokens, 1) if by_document else None,
    )


def _documents(source: TokenSource) -> Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """First token in the stream and length of documents: of each shard's, or of stretches spread over all of them."""
    ends = np.cumsum([shard.documents for shard in source.shards])
    total = int(ends[-1])
    if total <= MEASURED:
        ranges = [(number, 0, shard.documents) for number, shard in enumerate(source.shards)]
    else:
        ranges = []
        stretch = MEASURED // _STRETCHES
        for first in np.linspace(0, total - stretch, _STRETCHES).astype(int).tolist():
            shard = int(np.searchsorted(ends, first, side="right"))
            low = first - (int(ends[shard]) - source.shards[shard].documents)
            ranges.append((shard, low, min(low + stretch, source.shards[shard].documents)))
    before = np.cumsum([0, *(shard.tokens for shard in source.shards)])
    out = []
    for shard, low, high in ranges:
        start, size = source.shards[shard].spans(low, high)
        out.append((start + before[shard], size))
    return out


def packing_line(losses: Sequence[PackingLosses]) -> str:
    """One line for the start of a run, over all sources (by their documents)."""
    total = sum(one.documents for one in losses) or 1

    def mean(values: Sequence[float]) -> str:
        shares = (value * one.documents for value, one in zip(values, losses, strict=True))
        share = 100 * sum(shares) / total
        return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"

    ways = {
        "concatenate": f"cuts {mean([one.cut['concatenate'] for one in losses])} of the documents",
        "best_fit": f"cuts {mean([one.cut['best_fit'] for one in losses])} and pads {mean([o.padding for o in losses])}",
    }
    used = " and ".join(dict.fromkeys(one.packing for one in losses))
    return f"packing: {used} ({'; '.join(f'{name} {what}' for name, what in ways.items())})"
