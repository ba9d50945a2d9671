"""A checkpoint is data: nothing in its pickles runs, no name in it leads elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megacode.convert.checkpoint_reader import CheckpointReader
from megacode.convert.checkpoint_writer import CheckpointWriter
from megacode.errors import UserError
from megacode.megatron.checkpoint_index import read_index
from tests.processes import run_on

MARK = "planted code ran"
ENTRY = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"


class Planted:
    """Unpickled, it makes the file MARK in the working directory."""

    def __init__(self, call: Callable[..., Any] = os.mkdir) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call, (MARK,)


def saved(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    writer = CheckpointWriter(folder, 1)
    writer.add("embedding.word_embeddings.weight", None, torch.ones(4, 2))
    writer.finish()
    (folder / "megacode.json").write_text(json.dumps({"step": 1}))
    return folder


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def put_entry(folder: Path, data: bytes, key: str = ENTRY) -> None:
    """`data` in place of an entry."""
    (folder / "planted.distcp").write_bytes(data)

    def edit(index: Any) -> None:
        place = index.storage_data[MetadataIndex(key)]
        place.relative_path, place.offset, place.length = "planted.distcp", 0, len(data)

    change(folder, edit)


def refused(folder: Path) -> str:
    """What export and everything that loads weights says, which is the same."""
    with pytest.raises(UserError) as error:
        CheckpointReader.open(folder)
    assert not Path(MARK).exists()
    return str(error.value)


def test_what_is_written_is_read(checkpoint: Path) -> None:
    assert (
        CheckpointReader.open(checkpoint).tensor("embedding.word_embeddings.weight").tolist()
        == [[1, 1]] * 4
    )


def test_planted_code_does_not_run(checkpoint: Path) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted()))
    assert "asks for posix.mkdir, which no checkpoint needs" in refused(checkpoint)
    for protocol in range(
        pickle.HIGHEST_PROTOCOL + 1
    ):  # deep inside, in every way that pickles name a function
        (checkpoint / ".metadata").write_bytes(whole)
        index = pickle.loads(whole)
        index.planner_data = [{"a": Planted()}]
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index, protocol))
        assert "which no checkpoint needs" in refused(checkpoint)
    # Through what is allowed: an attribute of an allowed name, a function of an allowed module.
    dcp = "torch.distributed.checkpoint.filesystem"
    for module, name in (("torch", "Size.__class__"), ("torch", "load"), (dcp, "os.system")):
        asks = (
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
            + b"\x93."
        )
        (checkpoint / ".metadata").write_bytes(asks)
        assert f"asks for {module}.{name}" in refused(checkpoint)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "value",
    [
        [Planted()],
        io.BytesIO(saved(Planted())),
        io.BytesIO(pickle.dumps(Planted())),
        tensor_of(pickle.dumps(Planted())),  # as Transformer Engine keeps its state
        tensor_of(pickle.dumps({"scale_fwd": Planted(torch.storage._load_from_bytes)})),
        tensor_of(pickle.dumps({"scale_fwd": Planted(eval)})),
    ],
)
def test_nor_that_of_an_entry_which_is_no_tensor(checkpoint: Path, value: Any) -> None:
    put_entry(checkpoint, saved(value))
    words = refused(checkpoint)
    assert (
        "is not plain data" in words
        or "which no checkpoint needs" in words
        or "cannot be read" in words
    )


def test_the_state_of_fp8_layers_is_read(checkpoint: Path) -> None:
    state = {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}, "recipe": None}
    for value in (
        tensor_of(pickle.dumps(state)),
        io.BytesIO(saved(state)),
        torch.zeros(0, dtype=torch.uint8),
        [None],
        None,
    ):
        put_entry(checkpoint, saved(value))
        read_index(checkpoint)


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/etc/passwd", "a/../../outside.distcp", "link.distcp", "", 7]
)
def test_no_name_leads_out_of_the_folder(checkpoint: Path, name: Any) -> None:
    (checkpoint.parent / "outside.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    (checkpoint / "link.distcp").symlink_to(checkpoint.parent / "outside.distcp")

    def edit(index: Any) -> None:
        for place in index.storage_data.values():
            place.relative_path = name

    change(checkpoint, edit)
    words = refused(checkpoint)
    assert "leads out of" in words or "is not the name of a file" in words


def load(world: Any, folder: str) -> str:
    from megacode.megatron.checkpoint import load_checkpoint

    try:
        load_checkpoint(Path(folder), [], None)
    except UserError as error:
        return str(error)
    return "loaded"


def test_weights_are_loaded_after_the_index_was_read(checkpoint: Path) -> None:
    """Before Megatron-Core opens the folder, with chunks or without."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted()))
    (words,) = run_on(1, load, str(checkpoint))
    assert "which no checkpoint needs" in words and not Path(MARK).exists()
