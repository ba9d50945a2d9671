"""A Megatron-Core distributed checkpoint of weights alone, written one tensor at a time.

It is what `initialize_from` starts from. The files are those that torch.distributed.checkpoint
writes (see `checkpoint_reader`), beside the two small ones of Megatron-Core's format. Every layer
is one chunk of its stack, so any parallel layout reads what it needs.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    _number: int = 0
    """Of the file that is written to."""

    def add(self, key: str, layer: int | None, tensor: Tensor) -> None:
        """A tensor as stored (padded), of one layer of a stack or of none."""
        size, offsets = tensor.shape, torch.Size([0] * tensor.ndim)
        if layer is not None:
            size, offsets = torch.Size([self.layers, *size]), torch.Size([layer, *offsets])
            tensor = tensor.unsqueeze(0)
        properties = TensorProperties(dtype=tensor.dtype)
        stored = self._tensors.setdefault(key, TensorStorageMetadata(properties, size, chunks=[]))
        stored.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # else a part brings the whole along
            tensor = tensor.clone()
        self._write(MetadataIndex(key, offsets), tensor)

    def finish(self) -> None:
        """Everything but megacode.json, whose presence says that a checkpoint is complete."""
        # Megatron-Core's layers have a state of their own, for FP8; without it, none.
        for name in _LINEAR:
            for layer in range(self.layers):
                key = f"{LAYER}{name}._extra_state/shard_{layer}_{self.layers}"
                self._tensors[key] = BytesStorageMetadata()
                self._write(MetadataIndex(key), [None])
        metadata = Metadata(self._tensors, storage_data=self._storage)
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save({}, self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_FORMAT))

    def _write(self, index: MetadataIndex, value: Any) -> None:
        """Append an archive of `torch.save`, to a new file where this one is large enough."""
        with open(self.folder / f"__0_{self._number}.distcp", "ab") as file:
            start = file.tell()
            torch.save(value, file)
            name, end = Path(file.name).name, file.tell()
        self._storage[index] = _StorageInfo(name, start, end - start)
        self._number += end > _FILE_BYTES
