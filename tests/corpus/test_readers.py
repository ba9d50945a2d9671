"""Every good record comes out, in order, whatever stands around it; every bad one with its reason and bytes."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.corpus.inputs import InputFile, find_inputs
from megacode.corpus.readers import BadRecord, TextDocument, read_input
from megacode.errors import UserError


def one(path: Path, format: str = "auto") -> InputFile:
    (file,) = find_inputs([path], format, on_link=unexpected)
    return file


def texts(file: InputFile, field: str = "text", span: tuple[int, int] | None = None) -> list[str]:
    return [item.text for item in read_input(file, field, span) if isinstance(item, TextDocument)]


def bad(file: InputFile, field: str = "text") -> list[tuple[int, str]]:
    return [
        (item.record, item.reason)
        for item in read_input(file, field)
        if isinstance(item, BadRecord)
    ]


def jsonl(*values: str) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


MANY = [f"document {i} " + "é\n" * (i % 7) for i in range(3000)]


def compress(data: bytes, ending: str) -> bytes:
    return {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        "": bytes,
    }[ending](data)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(jsonl(*MANY), ending))
    assert texts(one(path)) == MANY


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_several_frames_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(
        compress(jsonl(*MANY[:1000]), ending)
        + compress(b"", ending)
        + compress(jsonl(*MANY[1000:]), ending)
    )
    assert texts(one(path)) == MANY


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_broken_file_gives_what_can_be_read_and_one_bad_record(
    tmp_path: Path, ending: str, damage: str
) -> None:
    noise = [os.urandom(200).hex() for _ in range(4000)]
    data = bytearray(compress(jsonl(*noise), ending))
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 255
        data[len(data) // 2 + 1 : len(data) // 2 + 40] = b"\xff" * 39
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data)
    found = texts(one(path))
    assert len(found) > 1000
    assert found[:1000] == noise[:1000]
    if damage == "truncated":
        assert found == noise[: len(found)]
    reasons = [reason for _, reason in bad(one(path))]
    assert any(reason.startswith(f"broken {ending}") for reason in reasons)


def test_zeros_after_a_gz_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a")) + b"\0" * 5000)
    assert (texts(one(path)), bad(one(path))) == (["a"], [])


def test_bad_lines_are_told_apart_and_placed(tmp_path: Path) -> None:
    lines = [
        jsonl("first"),
        b'{"text": "cut\n',
        b'{"other": "field"}\n',
        b'{"text": 5}\n',
        b'{"text": null}\n',
        b'{"text": ["a"]}\n',
        b'["text"]\n',
        b'{"text": "\xff\xfe"}\n',
        b'{"text": "nul \0 byte"}\n',
        b"\n",
        b'{"text": ""}\n',
        b"[" * 100_000 + b"\n",
        b'{"text": "crlf"}\r\n',
        b'{"text": "no newline at the end"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    assert texts(one(path)) == ["first", "crlf", "no newline at the end"]
    assert bad(one(path)) == [
        (2, "not JSON (Invalid control character at)"),
        (3, "no field 'text'"),
        (4, "field 'text' is a number, not text"),
        (5, "field 'text' is null, not text"),
        (6, "field 'text' is a list, not text"),
        (7, "the record is not an object"),
        (8, "not UTF-8 (invalid start byte)"),
        (9, "not JSON (Invalid control character at)"),
        (11, "empty text"),
        (12, "not JSON that can be read (nested too deeply)"),
    ]
    records = [item for item in read_input(one(path)) if isinstance(item, BadRecord)]
    assert [r.raw for r in records if not r.harmless] == [
        line for line in lines[1:12] if line.strip() and b'""' not in line
    ]
    assert [r.reason for r in records if r.harmless] == ["empty text"]


def test_a_nested_field_and_one_with_a_dot_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"a": {"b": "nested"}}\n{"a.b": "dotted", "a": {"b": "nested"}}\n{"a": "flat"}\n'
    )
    assert texts(one(path), "a.b") == ["nested", "dotted"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_spans_that_tile_a_file_give_every_record_once(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    values = [value or "x" for value in values]
    path.write_bytes(
        b"".join(json.dumps({"text": v}, ensure_ascii=False).encode() + b"\n" for v in values)
    )
    file = one(path)
    edges = sorted({0, file.size, *(min(cut, file.size) for cut in cuts)})
    found = [text for span in itertools.pairwise(edges) for text in texts(file, span=span)]
    assert found == values


def test_bytes_read_add_up(tmp_path: Path) -> None:
    for ending in ("", ".gz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(compress(jsonl(*MANY), ending))
        read: list[int] = []
        list(read_input(one(path), on_bytes=read.append))
        assert sum(read) == path.stat().st_size


def test_parquet_with_nested_null_binary_and_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {
            "text": ["a", None, "", "b\0c", "d"],
            "raw": pyarrow.array([b"ok", b"\xff", b"", None, b"x"], pyarrow.binary()),
            "meta": [{"text": f"nested {i}"} for i in range(5)],
            "number": list(range(5)),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    file = one(path)
    assert texts(file) == ["a", "b\0c", "d"]
    assert bad(file) == [(1, "field 'text' is null, not text"), (2, "empty text")]
    assert texts(file, "raw") == ["ok", "x"]
    assert bad(file, "raw")[0] == (1, "not UTF-8 (invalid start byte)")
    assert texts(file, "meta.text") == [f"nested {i}" for i in range(5)]
    assert bad(file, "meta.other")[0] == (0, "no field 'meta.other'")
    assert bad(file, "nothing") == [(i, "no field 'nothing'") for i in range(5)]
    assert bad(file, "number")[4] == (4, "field 'number' is a number, not text")
    assert texts(file, "meta.text", (1, 3)) == ["nested 2", "nested 3", "nested 4"]
    assert [item.record for item in read_input(file, "meta.text", (1, 2))] == [2, 3]
    path.write_bytes(path.read_bytes()[:-20])
    assert bad(one(path))[0][1].startswith("broken parquet")


def test_parquet_with_cells_that_python_has_no_value_for(tmp_path: Path) -> None:
    times = pyarrow.array(
        [1, None, 10**18 + 1], pyarrow.timestamp("ns")
    )  # with nanoseconds, beside a datetime
    far = pyarrow.array([0, 10**14, 10**14], pyarrow.timestamp("s"))  # beyond the year 9999
    table = pyarrow.table({"text": ["a", "b", "c"], "ns": times, "far": far})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    items = list(read_input(one(tmp_path / "a.parquet"), columns=["ns", "far"]))
    assert [item.text for item in items] == ["a", "b", "c"]
    assert [str(item.values["ns"])[:10] for item in items] == ["1970-01-01", "None", "2001-09-09"]
    assert "100000000000000" in items[2].values["far"]


def test_parquet_with_two_columns_of_one_name_is_broken(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert bad(one(tmp_path / "a.parquet"))[0][1].startswith("broken parquet")


def test_plain_files(tmp_path: Path) -> None:
    contents = {
        "a.py": b"x = 1\r\n",
        "b.txt": b"\xff",
        "c.png": b"\x89PNG\0",
        "d.txt": b"",
        "e.md.gz": gzip.compress(b"hi"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    items = [
        item for file in find_inputs([tmp_path], on_link=unexpected) for item in read_input(file)
    ]
    assert [item.text if isinstance(item, TextDocument) else item.reason for item in items] == [
        "x = 1\r\n", "not UTF-8 (invalid start byte)", "binary file", "empty text", "hi",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- which files


def unexpected(link: Path) -> None:
    raise AssertionError(link)


def names(files: list[InputFile]) -> list[tuple[str, str]]:
    return [(file.path.name, file.form) for file in files]


def test_a_download_of_records_is_read_without_its_readme(tmp_path: Path) -> None:
    (tmp_path / "chunk2").mkdir()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".gitattributes").write_text("x" * 10000)
    for name in ("chunk2/b.jsonl.zst", "a.jsonl"):
        (tmp_path / name).write_bytes(
            compress(jsonl(*MANY), ".zst" if name.endswith("zst") else "")
        )
    assert names(find_inputs([tmp_path], on_link=unexpected)) == [
        ("a.jsonl", "jsonl"),
        ("b.jsonl.zst", "jsonl"),
    ]


def test_a_repository_is_a_tree_of_files_even_with_a_little_data_in_it(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "src" / "main.py").write_text("x = 1\n" * 1000)
    (tmp_path / "sample.jsonl").write_bytes(jsonl("a"))
    (tmp_path / "package.json").write_text("{}" + " " * 9000)
    every = [("package.json", "file"), ("sample.jsonl", "file"), ("main.py", "file")]
    assert names(find_inputs([tmp_path], on_link=unexpected)) == every
    assert names(find_inputs([tmp_path], include=["*.py"], on_link=unexpected)) == [
        ("main.py", "file")
    ]
    assert names(find_inputs([tmp_path], include=["src/*"], on_link=unexpected)) == [
        ("main.py", "file")
    ]
    assert names(find_inputs([tmp_path], "jsonl", on_link=unexpected)) == [
        ("package.json", "jsonl"),
        ("sample.jsonl", "jsonl"),
    ]


def test_links_stay_in_the_folder_and_are_read_once(tmp_path: Path) -> None:
    """Others are counted: a repository may link to any file of the machine."""
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for path in (
        tree / "real" / "a.txt",
        elsewhere / "b.txt",
        tree / ".hidden" / "c.txt",
        tmp_path / "alone.txt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (tree / ".hidden" / "round").symlink_to(tree / ".hidden")
    out = {"etc": "/etc", "other": elsewhere, "up": "..", "alone": tmp_path / "alone.txt", "real/deep": "../../elsewhere/b.txt",
           "half": "real/deep", "nowhere": "/nothing"}  # fmt: skip
    for name, target in {
        **out,
        "again": "real",
        "self": ".",
        "seen": ".hidden",
        "same.txt": "real/a.txt",
        "lost": "no",
    }.items():
        (tree / name).symlink_to(target)
    links: list[Path] = []
    found = [
        file.path.relative_to(tree).as_posix()
        for file in find_inputs([tree], "files", on_link=links.append)
    ]
    assert found == ["same.txt", "real/a.txt", "seen/c.txt"]
    assert sorted(link.relative_to(tree).as_posix() for link in links) == sorted([*out, "lost"])

    # A glob is walked as a folder is; what is named is meant.
    links.clear()
    globbed = find_inputs([f"{tree}/*"], "files", on_link=links.append)
    assert {str(file.path.relative_to(tree)) for file in globbed} == {
        "same.txt", "real/a.txt", "again/a.txt", "self/same.txt", "self/real/a.txt", "self/seen/c.txt", "seen/c.txt",
    }  # fmt: skip
    assert len(links) >= len(out) - 1
    assert [
        file.path.name for file in find_inputs([tree / "alone", tree / "other"], on_link=unexpected)
    ] == ["alone", "b.txt"]
    (tmp_path / "linked").symlink_to(elsewhere)
    assert names(find_inputs([tmp_path / "linked"], on_link=unexpected)) == [("b.txt", "file")]
    with pytest.raises(
        UserError, match=r"\(1 links lead out of it or nowhere, and are not followed"
    ):
        find_inputs([f"{tree}/oth*"], on_link=links.append)


def test_a_hugging_face_cache_keeps_its_files_behind_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--me--code" / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "datasets--me--code" / "blobs" / "1234"
    blob.parent.mkdir()
    blob.write_bytes(jsonl("a"))
    (snapshot / "train.jsonl").symlink_to("../../../blobs/1234")
    (snapshot / "etc.jsonl").symlink_to("/etc/passwd")
    links: list[Path] = []
    for place in (snapshot, snapshot.parent, f"{snapshot}/*.jsonl"):
        assert names(find_inputs([place], on_link=links.append)) == [("train.jsonl", "jsonl")]
    assert [link.name for link in links] == ["etc.jsonl"] * 3


def test_what_must_not_be_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "closed" / "b.txt").write_text("b")
    scandir, access = os.scandir, os.access

    def closed(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:  # the tests may run as root, for whom nothing is closed
        patch.setattr(os, "scandir", closed)
        with pytest.raises(
            UserError, match=r"closed: this folder cannot be read \(Permission denied\)"
        ):
            find_inputs([tmp_path / "in"], on_link=unexpected)
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not str(path).endswith("b.txt")
    )
    with pytest.raises(UserError, match=r"b\.txt: this file cannot be read"):
        find_inputs([tmp_path / "in"], on_link=unexpected)


def test_globs_are_sorted_and_nothing_is_read_twice(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json.gz"):
        (tmp_path / name).write_bytes(b"x")
    found = find_inputs([tmp_path / "b.jsonl", f"{tmp_path}/*.json*"], on_link=unexpected)
    assert names(found) == [("b.jsonl", "jsonl"), ("a.jsonl", "jsonl"), ("c.json.gz", "jsonl")]


def test_no_files_is_a_sentence(tmp_path: Path) -> None:
    for given_path, expected in (
        ("nothing", "no such file"),
        ("*.parquet", "matches no file"),
        ("", "no file in this folder"),
    ):
        with pytest.raises(UserError, match=expected):
            find_inputs([f"{tmp_path}/{given_path}"], on_link=unexpected)


def test_a_list_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "list").write_text("b.jsonl\n\n  [a-c].jsonl\nc.txt\n")
    monkeypatch.chdir(tmp_path)
    assert [file.path.name for file in find_inputs(["@list"], on_link=unexpected)] == [
        "b.jsonl",
        "a.jsonl",
        "c.txt",
    ]
    with pytest.raises(UserError, match="@nothing: cannot read this list of inputs"):
        find_inputs(["@nothing"], on_link=unexpected)
