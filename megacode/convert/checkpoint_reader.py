"""Tensors out of a Megatron-Core distributed checkpoint, without a model, a GPU or process groups.

A checkpoint folder holds `.metadata` (a pickle of torch.distributed.checkpoint's classes: which
chunk of which tensor lies where) and `.distcp` files, in which every chunk is a tensor as
torch.save writes it. Chunks are mapped into memory one at a time; nothing else of a file is read.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.layout import LAYER
from megacode.errors import UserError
from megacode.megatron.checkpoint_index import read_index

_EXPECTED = "give a checkpoint that was written whole"


@dataclass(frozen=True)
class CheckpointReader:
    """An open checkpoint.

    Attributes:
        metadata: torch.distributed.checkpoint.metadata.Metadata.
        places: (name, offsets of the chunk) -> where it lies.
    """

    folder: Path
    metadata: Any
    places: dict[tuple[str, tuple[int, ...]], Any]

    @classmethod
    def open(cls, folder: Path) -> CheckpointReader:
        """UserError: the folder has no readable checkpoint; see `read_index`."""
        metadata = read_index(folder)
        storage = metadata.storage_data.items()
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in storage}
        return cls(folder, metadata, places)

    def _stored(self, key: str, layer: int | None) -> tuple[str, Any, int | None]:
        """Name, description and place in the stack.

        A checkpoint of layers that differ numbers them in the name, and has no stack.
        """
        tensors = self.metadata.state_dict_metadata
        if key in tensors:
            return key, tensors[key], layer
        numbered = key.replace(LAYER, f"{LAYER}{layer}.", 1)
        if numbered in tensors:
            return numbered, tensors[numbered], None
        raise UserError(f"{self.folder}: holds no {key}; its recipe.yaml describes another model")

    def shape(self, key: str, layer: int | None = None) -> tuple[int, ...]:
        """As stored, padding included; of one layer."""
        _, stored, layer = self._stored(key, layer)
        return tuple(stored.size if layer is None else stored.size[1:])

    def dtype(self, key: str, layer: int | None = None) -> torch.dtype:
        return self._stored(key, layer)[1].properties.dtype

    def tensor(self, key: str, layer: int | None = None) -> Tensor:
        """The whole tensor, or one layer's of a stack; mapped where it lies in one chunk.

        Raises:
            UserError: a chunk is damaged, cut short or missing.
        """
        name, stored, layer = self._stored(key, layer)
        size = torch.Size(stored.size if layer is None else stored.size[1:])
        parts: list[tuple[Sequence[int], Tensor]] = []
        for chunk in stored.chunks:
            if layer is None:
                parts.append((chunk.offsets, self._chunk(name, chunk, stored.properties.dtype)))
            elif 0 <= (at := layer - chunk.offsets[0]) < chunk.sizes[0]:
                part = self._chunk(name, chunk, stored.properties.dtype)[at]
                parts.append((chunk.offsets[1:], part))
        if len(parts) == 1 and parts[0][1].shape == size:
            return parts[0][1]
        filled = sum(part.numel() for _, part in parts)
        if filled != size.numel():
            raise UserError(
                f"{self.folder}: {name} is not whole "
                f"({filled:,} of {size.numel():,} numbers); {_EXPECTED}"
            )
        out = torch.empty(size, dtype=stored.properties.dtype)
        for offsets, part in parts:
            out[tuple(slice(o, o + s) for o, s in zip(offsets, part.shape, strict=True))] = part
        return out

    def _chunk(self, name: str, chunk: Any, dtype: torch.dtype) -> Tensor:
        place = self.places[name, tuple(chunk.offsets)]
        path = self.folder / place.relative_path
        begin = place.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(
                    file.fileno(), begin + place.length, offset=place.offset - begin,
                    access=mmap.ACCESS_COPY,  # torch warns of memory that is read-only
                )  # fmt: skip
            tensor = _mapped(data, chunk.sizes, dtype)
            if tensor is None:
                tensor = torch.load(io.BytesIO(data[begin:]), map_location="cpu", weights_only=True)
        except (
            *(OSError, EOFError, RuntimeError, ValueError, struct.error),
            *(pickle.UnpicklingError, zipfile.BadZipFile),
        ) as error:
            raise UserError(
                f"{path}: {name} cannot be read, the file is damaged or cut short; {_EXPECTED}"
            ) from error
        if tensor.shape != chunk.sizes:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)} instead of {tuple(chunk.sizes)}; "
                f"{_EXPECTED}"
            )
        return tensor


def _mapped(data: mmap.mmap, sizes: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """The tensor of the torch.save archive at the end of `data`, where its numbers lie.

    Such an archive is a zip file without compression. None where the numbers are not all there in
    order, as of a slice.
    """
    seekable: Any = data
    with zipfile.ZipFile(seekable) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    numbers, count = entries.get("data/0"), math.prod(sizes)
    if not numbers or not count or "data/1" in entries:
        return None
    if numbers.compress_type or numbers.file_size != count * dtype.itemsize:
        return None
    if "byteorder" in entries:
        begin = _begin(data, entries["byteorder"])
        if data[begin : begin + entries["byteorder"].file_size] != b"little":
            return None
    begin = _begin(data, numbers)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(sizes)


def _begin(data: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where an entry's content begins.

    Its local header has 30 bytes, the last four with the lengths of the name and of further fields.
    """
    name, further = struct.unpack_from("<HH", data, entry.header_offset + 26)
    return entry.header_offset + 30 + name + further
