"""The index of a checkpoint (`.metadata`) and its pickled entries, read without running code.

A checkpoint is data, often somebody else's. `read_index` admits only what a checkpoint consists of,
and comes before torch or Megatron-Core opens the folder.

Upstream fault: torch.distributed.checkpoint reads `.metadata` with `pickle.load`, and entries that
    are no tensors with `torch.load(weights_only=False)`: both run whatever code a file asks for.
Versions: torch 2.6 to 2.13.
Remove when: torch reads both as data. Test: `test_torch_runs_code_in_a_checkpoint`.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.errors import UserError
from megacode.files import inside

INDEX = ".metadata"
EMA = "optimizer.state.ema."
"""Begins the names of the moving averages of weights (`optimizer.ema`), fp32."""
_WHOLE = "give a checkpoint that was written whole"
_DCP = "torch.distributed.checkpoint"
_OF_INDEX = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *((f"{_DCP}.planner", name) for name in (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
}  # fmt: skip
"""Classes of an index, and the one function that gives a tensor's memory layout by its name."""
_OF_TENSORS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


def read_index(folder: Path) -> Any:
    """The torch.distributed.checkpoint.metadata.Metadata of a checkpoint, all of it plain data.

    Raises:
        UserError: it cannot be read, a file that it names is missing or lies outside the folder, or
            a pickle asks for anything but the classes of a checkpoint.
    """
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            index = _Unpickler(file, path, _OF_INDEX).load()
        tensors, places = dict(index.state_dict_metadata), dict(index.storage_data)
        names = sorted({place.relative_path for place in places.values()})
    except FileNotFoundError:
        raise UserError(
            f"{folder}: has no {INDEX} file; {_WHOLE} (Megatron-Core's distributed format)"
        ) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises what it likes
        raise UserError(f"{path}: cannot be read ({error}); {_WHOLE}") from error
    for name in names:
        if not inside(folder, name, str(path)).is_file():
            raise UserError(
                f"{folder}: the file {name} is missing; copy it here from where the run was, or "
                f"{_WHOLE}"
            )
    for entry, place in places.items():
        if type(tensors.get(entry.fqn)).__name__ != "TensorStorageMetadata":
            _check_entry(folder / place.relative_path, entry.fqn, place)
    return index


def _check_entry(path: Path, name: str, place: Any) -> None:
    """UserError unless an entry that is no tensor is plain data.

    It is a module's `_extra_state`, such as the scales of FP8.
    """
    if getattr(place, "transform_descriptors", None):
        raise UserError(
            f"{path}: {name} is stored transformed, which no checkpoint of Megatron-Core is; it is "
            "not read"
        )
    with open(path, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    value = _plain(data, path, name)
    if isinstance(value, io.BytesIO):
        value = _plain(value.getvalue(), path, name)
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.numel():
        # Transformer Engine unpickles these bytes.
        try:
            _Unpickler(io.BytesIO(value.numpy().tobytes()), path, _OF_TENSORS).load()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: {name} cannot be read ({error}); {_WHOLE}") from error


def _plain(data: bytes, path: Path, name: str) -> Any:
    """What torch.save wrote, if it is tensors, numbers, text and containers of them."""
    if not data:
        return None
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = (line.strip() for line in str(error).splitlines() if "GLOBAL" in line)
        reason = next(lines, str(error).split(". ")[0])
        raise UserError(
            f"{path}: {name} is not plain data, and is not read ({reason}); {_WHOLE}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: {name} cannot be read, the file is damaged or cut short; {_WHOLE}"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Looks up the objects in `allowed` and torch's number types; of tensors, FP8 recipes too."""

    def __init__(self, file: Any, path: Path, allowed: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self._path, self._allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        """UserError for a name that data has no need of."""
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if dtype or (module, name) in self._allowed:
            return super().find_class(module, name)
        if self._allowed is _OF_TENSORS:
            if (module, name) == ("torch.storage", "_load_from_bytes"):
                return lambda data: torch.load(
                    io.BytesIO(data), map_location="cpu", weights_only=True
                )
            if module == "transformer_engine.common.recipe" and "." not in name:
                found = getattr(importlib.import_module(module), name, None)
                if isinstance(found, type) and found.__module__ == module:
                    return found
        raise UserError(
            f"{self._path}: asks for {module}.{name}, which no checkpoint needs: reading it could "
            f"run code; it is not read. {_WHOLE[0].upper()}{_WHOLE[1:]}, from where you trust it"
        )
