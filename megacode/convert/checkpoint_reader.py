"""Tensors out of a Megatron-Core distributed checkpoint, one at a time, without a model, a GPU or process groups.

A checkpoint folder holds `.metadata` (a pickle of torch.distributed.checkpoint's own classes: which chunk of which tensor lies
where) and `.distcp` files in which every chunk is a tensor as torch.save writes it. A chunk is read by its own bytes only.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
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
    """An open checkpoint."""

    folder: Path
    metadata: Any  # torch.distributed.checkpoint.metadata.Metadata
    places: dict[tuple[str, tuple[int, ...]], Any]
    """(name, offsets of the chunk) -> where it lies."""

    @classmethod
    def open(cls, folder: Path) -> CheckpointReader:
        """UserError: there is no readable checkpoint of Megatron-Core's distributed format; see `read_index`."""
        metadata = read_index(folder)
        places = {
            (index.fqn, tuple(index.offset or ())): place
            for index, place in metadata.storage_data.items()
        }
        return cls(folder, metadata, places)

    def _stored(self, key: str, layer: int | None) -> tuple[str, int | None]:
        """Name and place in the stack; a checkpoint of layers that differ numbers them in the name instead."""
        tensors = self.metadata.state_dict_metadata
        if key in tensors:
            return key, layer
        numbered = f"{LAYER}{layer}.{key.removeprefix(LAYER)}"
        if numbered in tensors:
            return numbered, None
        raise UserError(f"{self.folder}: holds no {key}; its recipe.yaml describes another model")

    def shape(self, key: str, layer: int | None = None) -> tuple[int, ...]:
        """As stored, padding included; of one layer."""
        name, layer = self._stored(key, layer)
        size = tuple(self.metadata.state_dict_metadata[name].size)
        return size if layer is None else size[1:]

    def has(self, key: str) -> bool:
        return key in self.metadata.state_dict_metadata

    def dtype(self, key: str, layer: int | None = None) -> torch.dtype:
        return self.metadata.state_dict_metadata[self._stored(key, layer)[0]].properties.dtype

    def tensor(self, key: str, layer: int | None = None, scratch: Scratch | None = None) -> Tensor:
        """The whole tensor, or one layer's of a stack; holds it once and a chunk of it besides.

        Args:
            scratch: memory to read into; what was read into it before is gone then.

        Raises:
            UserError: a chunk is damaged, cut short or missing.
        """
        name, layer = self._stored(key, layer)
        stored = self.metadata.state_dict_metadata[name]
        size = tuple(stored.size)
        wanted = [
            c
            for c in stored.chunks
            if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]
        ]
        if len(wanted) == 1 and tuple(wanted[0].sizes) == (
            size if layer is None else (1, *size[1:])
        ):
            whole = self._chunk(name, wanted[0], stored.properties.dtype, scratch)
            return whole if layer is None else whole[0]
        out = torch.empty(size if layer is None else size[1:], dtype=stored.properties.dtype)
        filled = 0
        for chunk in wanted:
            offsets, sizes, part = (
                list(chunk.offsets),
                list(chunk.sizes),
                self._chunk(name, chunk, stored.properties.dtype, scratch),
            )
            if layer is not None:
                part, offsets, sizes = part[layer - offsets[0]], offsets[1:], sizes[1:]
            out[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
            filled += part.numel()
        if filled != out.numel():
            raise UserError(
                f"{self.folder}: {name} is not whole ({filled:,} of {out.numel():,} numbers); {_EXPECTED}"
            )
        return out

    def _chunk(self, name: str, chunk: Any, dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
        place = self.places[name, tuple(chunk.offsets)]
        path = self.folder / place.relative_path
        try:
            with open(path, "rb") as file:
                part = _Part(file, place.offset, place.length)
                tensor = _numbers(part, torch.Size(chunk.sizes), dtype, scratch or Scratch())
                if tensor is None:
                    part.seek(0)
                    tensor = torch.load(
                        io.BufferedReader(part), map_location="cpu", weights_only=True
                    )
        except (
            OSError,
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            zipfile.BadZipFile,
        ) as error:
            raise UserError(
                f"{path}: {name} cannot be read, the file is damaged or cut short; {_EXPECTED}"
            ) from error
        if tuple(tensor.shape) != tuple(chunk.sizes):
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)} instead of {tuple(chunk.sizes)}; {_EXPECTED}"
            )
        return tensor


class Scratch:
    """Memory that is used again: on many machines fresh memory costs as much as a copy into it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """uint8 `[size]`; the same memory as last time."""
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size]


def _numbers(part: _Part, sizes: torch.Size, dtype: torch.dtype, scratch: Scratch) -> Tensor | None:
    """The tensor of a torch.save archive (a zip file without compression), read straight into `scratch`; None where its
    numbers are not simply all there in order, as of a slice."""
    with zipfile.ZipFile(part) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
        order = [entry for entry in archive.infolist() if entry.filename.endswith("/byteorder")]
        if (
            len(found) != 1
            or found[0].compress_type
            or found[0].file_size != sizes.numel() * dtype.itemsize
        ):
            return None
        if any(archive.read(entry) != b"little" for entry in order):
            return None
    # A local header: 30 bytes, of which the last four are the lengths of the name and of what else follows.
    part.seek(found[0].header_offset + 26)
    name, more = struct.unpack("<HH", part.read(4))
    part.seek(name + more, io.SEEK_CUR)
    data = scratch.of(found[0].file_size)
    if part.readinto(data.numpy().data) != found[0].file_size:
        raise EOFError
    return data.view(dtype).view(sizes) if data.numel() else torch.empty(sizes, dtype=dtype)


class _Part(io.RawIOBase):
    """`length` bytes of a file, from `offset` on, as a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file: Any = file.raw
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            position + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        done = 0
        self._file.seek(self._offset + self._at)
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                break
            done += count
        self._at += done
        return done
