"""Safetensors files, written and read one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header with type,
shape and place of every tensor, then the tensors. Names, types and shapes are known before the
first tensor is, so files are written from front to end and nothing is held; the library itself
writes whole dictionaries only.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Group = Sequence[Planned]
"""Tensors that are read together."""


def write_files(
    folder: Path,
    groups: Sequence[Group],
    read: Callable[[int], Sequence[Tensor]],
    shard_bytes: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Write groups of tensors into as many files as it takes, and the index where there are more.

    Args:
        groups: in the order of writing.
        read: the tensors of a group by its number, of the planned shapes; they are converted here.
        on_bytes: told how much has been written.

    Raises:
        UserError: a tensor has a number that its type cannot hold.
    """
    shards: list[list[int]] = [[]]
    held = 0
    for number, group in enumerate(groups):
        size = _size(group)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(number)
        held += size
    weight_map: dict[str, str] = {}
    for place, numbers in enumerate(shards, 1):
        name = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        shard = {number: groups[number] for number in numbers}
        _write_one(folder / name, shard, read, on_bytes)
        weight_map |= {planned.name: name for group in shard.values() for planned in group}
    if len(shards) > 1:
        total = sum(map(_size, groups))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _size(group: Group) -> int:
    return sum(planned.nbytes for planned in group)


def _write_one(
    path: Path,
    groups: dict[int, Group],
    read: Callable[[int], Sequence[Tensor]],
    on_bytes: Callable[[int], None],
) -> None:
    """A file of the groups with these numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in (planned for group in groups.values() for planned in group):
        start, end = end, end + planned.nbytes
        header[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # One buffer is filled by a thread while the other is written. Fresh memory for each group would
    # cost as much as the copy into it.
    largest = max(map(_size, groups.values()))
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(min(2, len(groups)))]
    jobs = list(groups.items())

    def fill(at: int) -> memoryview:
        number, group = jobs[at]
        return _fill(buffers[at % 2], group, read(number))

    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        coming = pool.submit(fill, 0)
        for following in range(1, len(jobs) + 1):
            data = coming.result()
            if following < len(jobs):
                coming = pool.submit(fill, following)
            file.write(data)
            on_bytes(len(data))


def _fill(buffer: Tensor, group: Group, tensors: Sequence[Tensor]) -> memoryview:
    """A group's tensors, converted, one behind the other in `buffer`: their bytes in the file."""
    end = 0
    for planned, tensor in zip(group, tensors, strict=True):
        start, end = end, end + planned.nbytes
        written = buffer[start:end].view(planned.dtype).view(planned.shape)
        _copy(tensor, written)
        if overflows(tensor, written):
            raise UserError(
                f"{planned.name}: has numbers beyond 65,504, the largest of fp16; "
                "give --dtype bf16 or fp32"
            )
    return buffer[:end].numpy().data


def _copy(tensor: Tensor, out: Tensor) -> None:
    """`out.copy_(tensor)`; a transposed matrix in strips that fit the caches, which is faster."""
    if tensor.ndim == 2 and tensor.stride(0) == 1:
        for begin in range(0, tensor.shape[1], 256):
            out[:, begin : begin + 256].copy_(tensor[:, begin : begin + 256])
    else:
        out.copy_(tensor)


def overflows(before: Tensor, after: Tensor) -> bool:
    """Whether numbers became infinite in the type of `after`; only fp16 is so narrow."""
    if after.dtype != torch.float16 or before.dtype == torch.float16 or not after.isinf().any():
        return False
    return bool((after.isinf() & before.isfinite()).any())


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class HuggingFaceWeights:
    """Tensors of a Hugging Face folder by name; files are opened when a tensor is asked for."""

    folder: Path
    files: dict[str, Path]
    _loaded: dict[Path, dict[str, Tensor]] = field(default_factory=dict)
    """The last file of torch.save that was read."""

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceWeights:
        """UserError: no weights, or files missing that the index names."""
        weights = cls(folder, {})
        for index, single in (
            (INDEX, "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            if (folder / index).is_file():
                weights.files.update(_indexed(folder, index))
                return weights
            if (folder / single).is_file():
                names = weights._kinds_in(folder / single)
                weights.files.update(dict.fromkeys(names, folder / single))
                return weights
        raise UserError(
            f"{folder}: has neither model.safetensors nor an index of several; "
            "give a Hugging Face model's folder"
        )

    def tensor(self, name: str) -> Tensor:
        """UserError: its file is damaged. `files` must have the name."""
        path = self.files[name]
        with _told(path, f"{name} cannot be read"):
            if path.suffix != ".safetensors":
                return self._pickled(path)[name].clone()
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return file.get_tensor(name)

    def kinds(self) -> dict[str, tuple[str, int]]:
        """name -> (type as safetensors spells it, number of elements), of all in the files."""
        paths = sorted(set(self.files.values()))
        return {name: kind for path in paths for name, kind in self._kinds_in(path).items()}

    def _kinds_in(self, path: Path) -> dict[str, tuple[str, int]]:
        with _told(path, "cannot be read"):
            if path.suffix != ".safetensors":
                found = self._pickled(path).items()
                tensors = {name: value for name, value in found if isinstance(value, Tensor)}
                return {
                    n: (_NAMES.get(t.dtype, str(t.dtype)), t.numel()) for n, t in tensors.items()
                }
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {
                    n: (p.get_dtype(), torch.Size(p.get_shape()).numel()) for n, p in parts.items()
                }

    def _pickled(self, path: Path) -> dict[str, Tensor]:
        """What torch.save wrote: mapped, or read whole where it is no zip file (torch < 1.6)."""
        if path not in self._loaded:
            self._loaded.clear()
            self._loaded[path] = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        return self._loaded[path]


def _indexed(folder: Path, index: str) -> dict[str, Path]:
    """name -> file, of an index. UserError: it cannot be read, or names files that are missing."""
    try:
        weight_map = dict(json.loads((folder / index).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / index}: cannot be read ({error!r}); download the file again"
        ) from error
    paths = {name: inside(folder, name, str(folder / index)) for name in set(weight_map.values())}
    missing = sorted(name for name, path in paths.items() if not path.is_file())
    if missing:
        raise UserError(
            f"{folder}: the file {missing[0]}, which {index} names, is missing; download it"
        )
    return {name: paths[file] for name, file in weight_map.items()}


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the libraries raise what they like
        reason = (str(error).splitlines() or [repr(error)])[0][:200]
        raise UserError(f"{path}: {what} ({reason}); download the file again") from error
