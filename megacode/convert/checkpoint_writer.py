"""A Megatron-Core distributed checkpoint of weights alone, written one tensor at a time: what `initialize_from` starts from.

The files are those that torch.distributed.checkpoint writes (see `checkpoint_reader`), beside the two small ones of
Megatron-Core's format. Every layer is one chunk of its stack, so any parallel layout reads what it needs.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megacode.convert.layout import LAYER

_LINEAR = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_FILE_BYTES = 4 << 30
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass
class CheckpointWriter:
    """Tensors go to `add`, in any order; `finish` makes the folder a checkpoint.

    Attributes:
        folder: exists and is empty.
        layers: of the whole model.
    """

    folder: Path
    layers: int
    _tensors: dict[str, Any] = field(default_factory=dict)
    _storage: dict[Any, Any] = field(default_factory=dict)
    _file: BinaryIO | None = None
    _name: str = ""
    _number: int = 0

    def add(self, key: str, layer: int | None, tensor: Tensor) -> None:
        """A tensor as stored (padded), of one layer of a stack or of none."""
        whole = tuple(tensor.shape) if layer is None else (self.layers, *tensor.shape)
        part = tensor if layer is None else tensor.unsqueeze(0)
        offsets = torch.Size([0] * len(whole) if layer is None else [layer, *[0] * tensor.ndim])
        stored = self._tensors.setdefault(
            key,
            TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), torch.Size(whole), chunks=[]
            ),
        )
        stored.chunks.append(ChunkStorageMetadata(offsets, part.shape))
        self._write(MetadataIndex(key, offsets), part.contiguous())

    def finish(self) -> None:
        """Everything but megacode.json, whose presence says that a checkpoint is complete."""
        for (
            name
        ) in _LINEAR:  # Megatron-Core's layers have a state of their own, for FP8; without it, none
            for layer in range(self.layers):
                key = f"{LAYER}{name}._extra_state/shard_{layer}_{self.layers}"
                self._tensors[key] = BytesStorageMetadata()
                self._write(MetadataIndex(key), [None])
        if self._file:
            self._file.close()
        metadata = Metadata(self._tensors, storage_data=self._storage)
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save({}, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_FORMAT))

    def _write(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.tell() > _FILE_BYTES:
            if self._file:
                self._file.close()
            self._name = f"__0_{self._number}.distcp"
            self._file, self._number = open(self.folder / self._name, "wb"), self._number + 1  # noqa: SIM115
        start = self._file.tell()
        if isinstance(value, Tensor):
            torch.save(
                value.clone() if value.untyped_storage().nbytes() != value.nbytes else value,
                self._file,
            )
        else:
            small = io.BytesIO()
            torch.save(value, small)
            self._file.write(small.getvalue())
        self._storage[index] = _StorageInfo(self._name, start, self._file.tell() - start)
