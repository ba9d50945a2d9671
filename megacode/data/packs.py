"""A source's packs, shard after shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megacode.data.pack_index import PackIndex, open_pack_index
from megacode.data.shard import Shard


@dataclass(frozen=True, eq=False)
class SourcePacks:
    """The packs of all shards, numbered from the first shard's on."""

    indexes: tuple[PackIndex, ...]
    _ends: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def pieces(self, pack: int) -> tuple[int, NDArray[np.int64], NDArray[np.int32]]:
        """Shard, and first token in it and length of each piece of a pack."""
        shard = int(np.searchsorted(self._ends, pack, side="right"))
        starts, tokens = self.indexes[shard].pieces(pack - (int(self._ends[shard]) - self.indexes[shard].packs))
        return shard, starts, tokens


def open_packs(shards: Sequence[Shard], sequence_length: int, cache: Path | None = None) -> SourcePacks:
    """The packs of a source; UserError where an index cannot be made."""
    indexes = tuple(open_pack_index(shard, sequence_length, cache) for shard in shards)
    return SourcePacks(indexes, np.cumsum([index.packs for index in indexes], dtype=np.int64))
