"""Laws of reading tokenized sources, and a message for each way in which files can be wrong."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.planning import token_counts
from megacode.data.source import TokenSource, open_source
from megacode.errors import UserError
from tests.data.conftest import numbered, recipe_of, write_shard


def opened(folder: Path, *names: str, name: str = "s") -> TokenSource:
    return open_source(name, [str(folder / path) for path in names])


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_what_megatron_core_wrote_reads_back_equal(tmp_path: Path, vocab_size: int) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    random = np.random.default_rng(1)
    documents = [random.integers(0, vocab_size, n).tolist() for n in (5, 1, 300, 17, 64)]
    for shard, part in enumerate((documents[:2], documents[2:])):
        builder = indexed_dataset.IndexedDatasetBuilder(
            str(tmp_path / f"s{shard}.bin"), dtype=dtype
        )
        for document in part:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(str(tmp_path / f"s{shard}.idx"))
    source = opened(tmp_path, "s*")
    stream = [token for document in documents for token in document]
    assert (source.tokens, source.documents) == (len(stream), len(documents))
    assert source.read(np.array([0]), source.tokens)[0].tolist() == stream
    assert source.dtype == dtype


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(10), [4, 0, 6])
    builder.add_document(torch.arange(0), [])
    builder.add_document(torch.arange(3), [3])
    builder.finalize(str(tmp_path / "s.idx"))
    source = opened(tmp_path, "s")
    assert source.documents == 3
    where = [(d.document, d.start, d.tokens) for d in map(source.document_at, (0, 3, 4, 9, 10, 12))]
    assert where == [(0, 0, 10)] * 4 + [(2, 10, 3)] * 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reads_anywhere_across_shards_are_slices_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("s")
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
    first = 0
    for shard, size in enumerate(sizes):
        vocab_size = data.draw(st.sampled_from([1000, 100_000]))  # shards may differ in token type
        write_shard(folder / f"s{shard}", numbered(size, document=7, first=first), vocab_size)
        first += size
    source = opened(folder, *(f"s{shard}" for shard in range(len(sizes))))
    length = data.draw(st.integers(1, first))
    starts = np.array(data.draw(st.lists(st.integers(0, first - length), min_size=1, max_size=9)))
    assert np.array_equal(source.read(starts, length), starts[:, None] + np.arange(length))


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    for shard in range(120):
        write_shard(tmp_path / f"s{shard:03}", numbered(10, first=10 * shard))
    source = opened(tmp_path, "s*")
    for _ in range(2):
        assert source.read(np.arange(0, 1200, 10), 10).reshape(-1).tolist() == list(range(1200))
    assert len(source._files) < 60
    source.close()
    assert source.read(np.array([1190]), 10)[0, -1] == 1199


def test_every_token_knows_its_document(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1] * 5, [2] * 3])
    write_shard(tmp_path / "b", [[3] * 4])
    source = opened(tmp_path, "a", "b")
    found = [
        (d.prefix.name, d.document, d.start, d.tokens)
        for d in map(source.document_at, range(source.tokens))
    ]
    assert found == [("a", 0, 0, 5)] * 5 + [("a", 1, 5, 3)] * 3 + [("b", 0, 8, 4)] * 4
    with pytest.raises(IndexError):
        source.document_at(12)


def test_outside_the_stream_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", numbered(10))
    source = opened(tmp_path, "s")
    for start in (-1, 6):
        with pytest.raises(IndexError, match="source s"):
            source.read(np.array([start]), 5)
    assert source.read(np.empty(0, np.int64), 5).shape == (0, 5)


def test_opening_costs_the_same_whatever_the_size(tmp_path: Path) -> None:
    """A 400-billion-token source of sparse files, opened and read at both ends."""
    documents, tokens = 400_000_000, 400_000_000_000
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(2 * tokens)
        file.seek(2 * (tokens - 1))
        file.write(struct.pack("<H", 7))
    with open(tmp_path / "big.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        file.truncate(34 + 12 * documents + 8 * (documents + 1))
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", 1000))
        file.seek(34 + 12 * documents - 8)
        file.write(struct.pack("<q", 2 * (tokens - 1000)))
        file.seek(34 + 12 * documents + 8 * documents)
        file.write(struct.pack("<q", documents))
    source = opened(tmp_path, "big")
    assert (source.tokens, source.documents) == (tokens, documents)
    assert source.read(np.array([0, tokens - 3]), 3).tolist() == [[0, 0, 0], [0, 0, 7]]


def broken(folder: Path, how: str) -> None:
    idx, data = folder / "s.idx", folder / "s.bin"
    header = idx.read_bytes()
    if how == "no bin":
        data.unlink()
    elif how == "no idx":
        idx.unlink()
    elif how == "nothing":
        idx.unlink(), data.unlink()
    elif how == "header cut":
        idx.write_bytes(header[:20])
    elif how == "idx cut":
        idx.write_bytes(header[:-8])
    elif how == "other file":
        idx.write_bytes(b"not an index" * 9)
    elif how == "empty idx":
        idx.write_bytes(b"")
    elif how == "version":
        idx.write_bytes(header[:9] + struct.pack("<Q", 2) + header[17:])
    elif how == "floats":
        idx.write_bytes(header[:17] + b"\x07" + header[18:])
    elif how == "no boundaries":
        n = struct.unpack("<Q", header[18:26])[0]
        idx.write_bytes(header[:26] + struct.pack("<Q", 0) + header[34 : 34 + 12 * n])
    elif how == "boundaries end early":
        idx.write_bytes(header[:-8] + header[-16:-8])
    elif how == "boundaries begin late":
        n = struct.unpack("<Q", header[18:26])[0]
        at = 34 + 12 * n
        idx.write_bytes(header[:at] + header[at + 8 : at + 16] + header[at + 8 :])
    elif how == "bin cut":
        data.write_bytes(data.read_bytes()[:-2])
    elif how == "bin longer":
        data.write_bytes(data.read_bytes() + b"xx")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no bin", "s.bin is missing beside s.idx"),
        ("no idx", "s.idx is missing beside s.bin"),
        ("nothing", "matches no .bin/.idx files"),
        ("header cut", "cut short"),
        ("idx cut", "where its header says"),
        ("other file", "not the index of a Megatron-Core IndexedDataset"),
        ("empty idx", "not the index"),
        ("version", "format version 2"),
        ("floats", "type float32; tokens are integers"),
        ("no boundaries", "its document boundaries are missing"),
        ("boundaries end early", "its document boundaries begin at 0 and end at "),
        ("boundaries begin late", "its document boundaries begin at 1 and end at "),
        ("bin cut", "where its index says"),
        ("bin longer", "where its index says"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, how: str, message: str) -> None:
    write_shard(tmp_path / "s", numbered(100))
    broken(tmp_path, how)
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, "s", name="python")
    assert str(error.value).startswith("sources.python.path: ") and str(tmp_path) in str(
        error.value
    )


def test_empty_sources_globs_without_match_and_repeats_are_one_sentence(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", numbered(10))
    write_shard(tmp_path / "empty", [])
    for paths, message in (
        (["empty"], "has no tokens"),
        (["nothing*"], "matches no .bin/.idx files"),
        (["s", "s.bin"], "is there twice"),
        ([], "names no data"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, *paths, name="x")
    assert opened(tmp_path, "empty", "s").tokens == 10


def test_a_file_that_shrinks_while_open_is_one_sentence(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", numbered(100))
    source = opened(tmp_path, "s", name="x")
    (tmp_path / "s.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"sources\.x: .*got shorter"):
        source.read(np.array([0]), 10)


def test_a_name_with_brackets_is_a_name_before_it_is_a_glob(tmp_path: Path) -> None:
    write_shard(tmp_path / "c[1]", numbered(10))
    assert opened(tmp_path, "c[1]").tokens == 10


def test_counts_come_from_data_else_from_the_recipe(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", numbered(10))

    def count(source: dict[str, Any]) -> dict[str, int]:
        mixture = {"sources": {"x": 1}}
        if "path" in source:
            names = [source["path"]] if isinstance(source["path"], str) else source["path"]
            source = {**source, "path": [str(tmp_path / name) for name in names]}
        sources = {"x": source, "unread": {"path": "no"}}
        return token_counts(recipe_of(sources, [{"steps": 1, "mixture": mixture}]))

    assert count({"path": "s", "tokens": 99}) == {"x": 10}
    assert count({"path": "missing", "tokens": 99}) == {"x": 99}
    assert count({"tokens": 99}) == {"x": 99}
    with pytest.raises(UserError, match=r"sources\.x: give `path` \(data\) or `tokens`"):
        count({})
    with pytest.raises(UserError, match=r"sources\.x\.path: no data at .*missing"):
        count({"path": "missing"})
    with pytest.raises(UserError, match="missing matches no"):
        count({"path": ["s", "missing"], "tokens": 99})


def test_reading_sources_imports_no_torch() -> None:
    code = "import megacode.data.loader, sys; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
