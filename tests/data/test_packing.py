"""Laws of best-fit packing: nothing is lost or cut, it is best-fit decreasing, and one process makes one index."""

from __future__ import annotations

import bisect
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data import pack_index
from megacode.data.best_fit import best_fit, pack_documents
from megacode.data.indexed import Shard, open_shard
from megacode.data.pack_index import PackIndex, index_path, open_pack_index
from megacode.errors import UserError
from megacode.plan.streams import PACKING_ALGORITHM
from tests.data.conftest import numbered, write_shard

LENGTHS = st.lists(st.integers(0, 70), max_size=150)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in every bin, sorted: each piece, longest first, into the fullest bin that takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return rooms


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=200), capacity=st.integers(40, 60))
def test_it_is_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins, opened = best_fit(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=lengths, minlength=opened).astype(int)
    assert sorted((capacity - filled).tolist()) == plain_best_fit(lengths, capacity)


def test_it_is_best_fit_decreasing_for_long_rooms() -> None:
    random = np.random.default_rng(5)
    lengths = np.clip(random.lognormal(7, 1.5, 3000), 1, 70_000).astype(
        np.int64
    )  # above 2^16 another sort is used
    bins, opened = best_fit(lengths, 70_000)
    filled = np.bincount(bins, weights=lengths, minlength=opened).astype(int)
    assert sorted((70_000 - filled).tolist()) == plain_best_fit(lengths.tolist(), 70_000)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(1, 40), gap=st.integers(0, 5), block=st.integers(0, 3))
def test_every_token_is_in_one_pack_and_no_document_that_fits_is_cut(
    lengths: list[int], capacity: int, gap: int, block: int
) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    starts = (
        1000 + np.concatenate([[0], np.cumsum(tokens + gap)[:-1]]).astype(np.int64)[: len(tokens)]
    )
    packs = pack_documents(starts, tokens, capacity, block)
    pieces = list(zip(packs.start.tolist(), packs.tokens.tolist(), strict=True))
    shown = Counter(token for start, count in pieces for token in range(start, start + count))
    assert shown == Counter(
        t for s, n in zip(starts.tolist(), lengths, strict=True) for t in range(s, s + n)
    )
    whole = {(s, n) for s, n in zip(starts.tolist(), lengths, strict=True) if 0 < n <= capacity}
    assert whole <= set(pieces)
    for first, stop in zip(packs.first[:-1], packs.first[1:], strict=True):
        assert (
            0 < packs.tokens[first:stop].sum() <= capacity
            and (np.diff(packs.start[first:stop]) > 0).all()
        )


def test_realistic_lengths_fill_packs() -> None:
    random = np.random.default_rng(1)
    for median, capacity in ((400, 2049), (400, 513), (900, 8193)):
        tokens = np.clip(random.lognormal(np.log(median), 1.3, 20_000), 1, None).astype(np.int64)
        starts = np.cumsum(tokens) - tokens
        packs = pack_documents(starts, tokens, capacity)
        assert tokens.sum() / (len(packs) * capacity) > 0.995


def test_any_part_of_a_block_is_like_the_whole() -> None:
    """The first tenth of the packs (a subset) holds no other documents than the rest: not the longest ones."""
    tokens = np.clip(np.random.default_rng(2).lognormal(6, 1, 50_000), 1, None).astype(np.int64)
    packs = pack_documents(np.cumsum(tokens) - tokens, tokens, 2049)
    sizes = np.diff(packs.first)
    assert sizes[: len(sizes) // 10].mean() == pytest.approx(sizes.mean(), rel=0.05)


# ------------------------------------------------------------------------------------------------------------ on disk


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shard:
    """1,000 documents of 0 to 59 tokens that count up, in blocks of 64."""
    monkeypatch.setattr(pack_index, "BLOCK", 64)
    tokens = np.random.default_rng(3).integers(0, 60, 1000)
    ids = iter(range(10**6))
    write_shard(tmp_path / "s", [[next(ids) for _ in range(n)] for n in tokens.tolist()], 200_000)
    return open_shard(tmp_path / "s")


def contents(index: PackIndex) -> list[list[tuple[int, int]]]:
    return [list(zip(*index.pieces(pack), strict=True)) for pack in range(index.packs)]


def test_an_index_holds_every_token_once_block_by_block(shard: Shard) -> None:
    index = open_pack_index(shard, 32)
    shown = sorted(
        token for pack in contents(index) for start, n in pack for token in range(start, start + n)
    )
    assert (
        shown == list(range(shard.tokens))
        and index.tokens == shard.tokens
        and index.documents == 1000
    )
    edges = shard.token_edges(0, 1000)
    assert index.cut == int((np.diff(edges) > 33).sum())
    blocks = [
        np.searchsorted(edges[:-1:64], [start for start, _ in pack], side="right")
        for pack in contents(index)
    ]
    assert all(len(set(block)) == 1 for block in blocks)
    for pack in (-1, index.packs):
        with pytest.raises(IndexError, match="outside"):
            index.pieces(pack)


def test_an_index_is_made_once_and_again_when_anything_it_depends_on_changes(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = index_path(shard, 32, None)
    first, made = contents(open_pack_index(shard, 32)), os.stat(path).st_ino
    assert contents(open_pack_index(shard, 32)) == first and os.stat(path).st_ino == made
    monkeypatch.setattr(pack_index, "PACKING_ALGORITHM", PACKING_ALGORITHM + 1)
    assert contents(open_pack_index(shard, 32)) == first and os.stat(path).st_ino != made
    write_shard(shard.prefix, numbered(1000, document=20), 200_000)
    changed = open_shard(shard.prefix)
    assert open_pack_index(changed, 32).documents == 50
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.bin", "s.idx", "s.pack-32"]


@pytest.mark.parametrize(
    "damage", [b"", b"no index at all, but long enough to be read as one ...", None]
)
def test_a_damaged_index_is_made_again(shard: Shard, damage: bytes | None) -> None:
    first, path = contents(open_pack_index(shard, 32)), index_path(shard, 32, None)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert contents(open_pack_index(shard, 32)) == first


def open_in_a_process(prefix: Path, made: Any, together: Any) -> None:
    original = pack_index._contents

    def counted(*arguments: Any) -> Iterator[bytes]:
        made.release()
        time.sleep(0.5)  # long enough for the others to come
        return original(*arguments)

    pack_index._contents = counted
    together.wait()
    open_pack_index(open_shard(prefix), 2048)


def test_of_many_processes_one_makes_the_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", numbered(200_000, document=7), 1_000_000)
    spawn = multiprocessing.get_context("spawn")
    made, together = spawn.Semaphore(0), spawn.Barrier(4)
    children = [
        spawn.Process(target=open_in_a_process, args=(tmp_path / "s", made, together))
        for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert made.acquire(block=False) and not made.acquire(block=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.idx", "s.pack-2048"]


def test_what_a_killed_process_left_is_taken_over(shard: Shard) -> None:
    path = index_path(shard, 32, None)
    lock = path.with_name(path.name + ".building")
    lock.touch()
    os.utime(lock, (1, 1))
    assert open_pack_index(shard, 32).documents == 1000
    assert not lock.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence_and_a_cache_helps(
    shard: Shard, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.packing: cannot write .* set `data\.pack_cache`"):
        open_pack_index(shard, 32, tmp_path / "file" / "cache")
    index = open_pack_index(shard, 32, tmp_path / "cache" / "packs")
    assert index.path.parent == tmp_path / "cache" / "packs" and contents(index) == contents(
        open_pack_index(shard, 32)
    )
