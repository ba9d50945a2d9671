"""Safetensors files, written and read one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header with type, shape and place of every
tensor, then the tensors. Names, types and shapes are known before the first tensor is, so files are written from front to end
and nothing is held; the library itself writes whole dictionaries only.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.checkpoint_reader import Scratch
from megacode.errors import UserError
from megacode.files import inside

INDEX = "model.safetensors.index.json"
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        return torch.Size(self.shape).numel() * dtype.itemsize


def write_files(
    folder: Path, groups: Sequence[Sequence[Planned]], read: Callable[[int], Sequence[Tensor]], dtype: torch.dtype,
    shard_bytes: int, on_bytes: Callable[[int], None],
) -> None:  # fmt: skip
    """Write groups of tensors into as many files as it takes, and the index where there is more than one.

    Args:
        groups: tensors that come together, in the order of writing.
        read: the tensors of a group by its number, converted to `dtype` here.
        on_bytes: told how much has been written.

    Raises:
        UserError: a tensor does not have the planned shape, or has a number that `dtype` cannot hold.
    """
    shards: list[list[int]] = [[]]
    held = 0
    for number, group in enumerate(groups):
        size = sum(planned.nbytes(dtype) for planned in group)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(number)
        held += size
    weight_map: dict[str, str] = {}
    for place, numbers in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        )
        weight_map |= {planned.name: name for number in numbers for planned in groups[number]}
        _write_one(folder / name, [(groups[n], n) for n in numbers], read, dtype, on_bytes)
    if len(shards) > 1:
        total = sum(planned.nbytes(dtype) for group in groups for planned in group)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_one(
    path: Path, groups: Sequence[tuple[Sequence[Planned], int]], read: Callable[[int], Sequence[Tensor]],
    dtype: torch.dtype, on_bytes: Callable[[int], None],
) -> None:  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group, _ in groups:
        for planned in group:
            start, end = end, end + planned.nbytes(dtype)
            header[planned.name] = {
                "dtype": _NAMES[dtype],
                "shape": list(planned.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        buffers = [Scratch(), Scratch()]  # one is filled while the other is written

        def make(at: int) -> list[memoryview]:
            return _bytes_of(*groups[at], read, dtype, buffers[at % 2])

        for data in _one_ahead(make, len(groups)):
            for tensor in data:
                done = 0
                while done < len(tensor):
                    done += file.write(tensor[done : done + (1 << 26)])
                on_bytes(len(tensor))


def _bytes_of(
    group: Sequence[Planned],
    number: int,
    read: Callable[[int], Sequence[Tensor]],
    dtype: torch.dtype,
    buffer: Scratch,
) -> list[memoryview]:
    """A group's tensors as they stand in a file, in `buffer`."""
    parts = buffer.of(sum(planned.nbytes(dtype) for planned in group)).split(
        [p.nbytes(dtype) for p in group]
    )
    for planned, tensor, part in zip(group, read(number), parts, strict=True):
        if tuple(tensor.shape) != planned.shape:
            raise UserError(
                f"{planned.name}: has shape {tuple(tensor.shape)} in the checkpoint and {planned.shape} by its recipe"
            )
        written = part.view(dtype).view(planned.shape)
        _copy(tensor, written)
        if overflows(tensor, written):
            raise UserError(
                f"{planned.name}: has numbers beyond 65,504, the largest of fp16; give --dtype bf16 or fp32"
            )
    return [part.numpy().data for part in parts]


def _copy(tensor: Tensor, out: Tensor) -> None:
    """`out.copy_(tensor)`; a transposed matrix in strips that fit the caches, which is several times faster."""
    if tensor.ndim == 2 and tensor.stride(0) == 1:
        for begin in range(0, tensor.shape[1], 256):
            out[:, begin : begin + 256].copy_(tensor[:, begin : begin + 256])
    else:
        out.copy_(tensor)


def overflows(before: Tensor, after: Tensor) -> bool:
    """Whether numbers became infinite in going to the type of `after`; only fp16 is so narrow."""
    if after.dtype != torch.float16 or before.dtype == torch.float16 or not after.isinf().any():
        return False
    return bool((after.isinf() & before.isfinite()).any())


def _one_ahead(make: Callable[[int], list[memoryview]], count: int) -> Iterator[list[memoryview]]:
    """`make(0)`, `make(1)` ...: each is made by a thread while the one before it is used (and not later)."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, 0) if count else None
        for number in range(count):
            assert coming is not None
            made = coming.result()
            coming = pool.submit(make, number + 1) if number + 1 < count else None
            yield made


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class HuggingFaceWeights:
    """Tensors of a Hugging Face folder by name; files are opened when a tensor is asked for."""

    folder: Path
    files: dict[str, Path]
    _whole: dict[Path, dict[str, Tensor]] = field(default_factory=dict)
    """The last file read that can only be read whole."""

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceWeights:
        """UserError: no weights, or files missing that the index names."""
        for index, single in (
            (INDEX, "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            if (folder / index).is_file():
                try:
                    weight_map = dict(json.loads((folder / index).read_text())["weight_map"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{folder / index}: cannot be read ({error!r}); download the file again"
                    ) from error
                paths = {
                    name: inside(folder, name, f"{folder / index}")
                    for name in set(weight_map.values())
                }
                missing = sorted(name for name, path in paths.items() if not path.is_file())
                if missing:
                    raise UserError(
                        f"{folder}: the file {missing[0]}, which {index} names, is missing; download it"
                    )
                return cls(folder, {name: paths[file] for name, file in weight_map.items()})
            if (folder / single).is_file():
                weights = cls(folder, {})
                return replace(
                    weights,
                    files=dict.fromkeys(weights._sizes_in(folder / single), folder / single),
                )
        raise UserError(
            f"{folder}: has neither model.safetensors nor an index of several; give a Hugging Face model's folder"
        )

    def has(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """UserError: there is no such tensor, or its file is damaged."""
        if name not in self.files:
            raise UserError(
                f"{self.folder}: has no tensor {name}; its config.json describes another model"
            )
        path = self.files[name]
        with _told(path, f"{name} cannot be read"):
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    return file.get_tensor(name)
            return self._pickled(path)[name].clone()

    def sizes(self) -> dict[str, tuple[str, int]]:
        """name -> (type as safetensors spells it, number of elements), of everything in the files."""
        paths = sorted(set(self.files.values()))
        return {name: size for path in paths for name, size in self._sizes_in(path).items()}

    def _sizes_in(self, path: Path) -> dict[str, tuple[str, int]]:
        with _told(path, "cannot be read"):
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
                    return {
                        n: (p.get_dtype(), torch.Size(p.get_shape()).numel())
                        for n, p in parts.items()
                    }
            tensors = {
                name: value
                for name, value in self._pickled(path).items()
                if isinstance(value, Tensor)
            }
            return {n: (_NAMES.get(t.dtype, str(t.dtype)), t.numel()) for n, t in tensors.items()}

    def _pickled(self, path: Path) -> dict[str, Tensor]:
        """What torch.save wrote: mapped where it is a zip file, else (before torch 1.6) read whole."""
        if zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if path not in self._whole:
            self._whole.clear()
            self._whole[path] = torch.load(path, map_location="cpu", weights_only=True)
        return self._whole[path]


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the libraries raise what they like
        reason = (str(error).splitlines() or [repr(error)])[0][:200]
        raise UserError(f"{path}: {what} ({reason}); download the file again") from error
