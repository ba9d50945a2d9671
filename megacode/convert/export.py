"""A checkpoint of any parallel layout -> a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.checkpoint_reader import CheckpointReader, Scratch
from megacode.convert.families import choose
from megacode.convert.family import Family
from megacode.convert.kept import GENERATION, Outgoing, outgoing
from megacode.convert.layout import EMBEDDING, Slot, shape, unpadded
from megacode.convert.new_folder import new_folder
from megacode.convert.safetensors_files import Planned, write_files
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Model, Recipe
from megacode.run.checkpoints import find_checkpoint, read_info

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint ready to be exported.

    Attributes:
        checkpoint: its folder; `info` is its megacode.json.
        vocab_size: without padding.
    """

    checkpoint: Path
    info: dict[str, Any]
    recipe: Recipe
    reader: CheckpointReader
    vocab_size: int

    @classmethod
    def open(cls, path: str | Path) -> ExportSource:
        """A run's latest checkpoint, or the one given. UserError: there is none, or it is not whole."""
        checkpoint = find_checkpoint(path)
        info = read_info(checkpoint)
        if not (checkpoint / "recipe.yaml").is_file():
            raise UserError(
                f"{checkpoint}: has no recipe.yaml, so its model is not known; copy the run's recipe.yaml into it"
            )
        recipe = load_recipe(checkpoint / "recipe.yaml")
        vocab_size = info.get("vocab_size") or recipe.model.vocab_size
        if not vocab_size:
            raise UserError(
                f"{checkpoint / 'recipe.yaml'}: model.vocab_size: is not given, and megacode.json does not say; add it"
            )
        return cls(checkpoint, info, recipe, CheckpointReader.open(checkpoint), int(vocab_size))

    @property
    def model(self) -> Model:
        return self.recipe.model

    @property
    def length(self) -> int:
        return self.model.context_length or max(
            phase.sequence_length for phase in self.recipe.phases
        )

    def tensors(self, slot: Slot, scratch: Scratch | None = None) -> list[Tensor]:
        """The Hugging Face tensors of a slot; they may lie in `scratch`."""
        stored = self.reader.tensor(slot.key, slot.layer, scratch)
        return slot.form.split(self.model, unpadded(self.model, self.vocab_size, slot.key, stored))

    def planned(self, slot: Slot) -> list[Planned]:
        """Their names and shapes, by the recipe alone."""
        empty = torch.empty(
            shape(self.model, self.vocab_size, slot.key, self.length), device="meta"
        )
        return [
            Planned(name, tuple(tensor.shape))
            for name, tensor in zip(slot.names, slot.form.split(self.model, empty), strict=True)
        ]


def total_bytes(source: ExportSource, family: Family, dtype: torch.dtype) -> int:
    """Of the weights that an export writes."""
    return sum(
        planned.nbytes(dtype)
        for slot in family.slots(source.model)
        for planned in source.planned(slot)
    )


def stored_dtype(source: ExportSource) -> torch.dtype:
    return source.reader.dtype(EMBEDDING)


def export(
    source: ExportSource, out: Path, family: Family, dtype: torch.dtype, shard_bytes: int = 5_000_000_000,
    on_bytes: Callable[[int], None] = lambda count: None, about: Outgoing | None = None,
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write a Hugging Face folder, whole or not at all.

    Args:
        on_bytes: told how much of the weights has been written.
        about: ids of special tokens and generation defaults for the configs.
        extra: writes further files (tokenizer, card) into the folder before it gets its name.

    Raises:
        UserError: the checkpoint is damaged, its tensors are not those of its recipe, or `out` cannot be written.
    """
    with new_folder(out) as temporary:
        slots = list(family.slots(source.model))
        _check_shapes(source, slots)
        scratch = Scratch()
        write_files(
            temporary,
            [source.planned(slot) for slot in slots],
            lambda n: source.tensors(slots[n], scratch),
            dtype,
            shard_bytes,
            on_bytes,
        )
        _write_configs(
            temporary,
            source,
            family,
            dtype,
            about or outgoing(source.info.get("imported"), {}, None),
        )
        for name in family.remote_code:
            code = Path(__file__).parent / "crystalcoder" / name
            shutil.copyfile(code, temporary / name)
        extra(temporary)


def _check_shapes(source: ExportSource, slots: list[Slot]) -> None:
    """Before anything is written: every tensor is there and large enough for what the recipe says."""
    model = source.model
    for slot in slots:
        wanted = shape(model, source.vocab_size, slot.key, source.length)
        stored = source.reader.shape(slot.key, slot.layer)
        fits = len(stored) == len(wanted) and all(
            s >= w for s, w in zip(stored, wanted, strict=True)
        )
        if not fits:
            raise UserError(
                f"{source.checkpoint}: {slot.key} has shape {stored}, and recipe.yaml asks for {wanted}; the two belong to "
                "different models"
            )


def _write_configs(
    folder: Path, source: ExportSource, family: Family, dtype: torch.dtype, about: Outgoing
) -> None:
    name = str(dtype).removeprefix("torch.")
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": source.vocab_size,
        "tie_word_embeddings": source.model.tie_embeddings,
        "torch_dtype": name,
        "use_cache": True,
        **about.ids,
        **family.config(source.model, source.length),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / GENERATION, about.generation)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def chosen_family(source: ExportSource, name: str | None) -> Family:
    """`choose`, naming the checkpoint's recipe."""
    return choose(source.model, name, str(source.checkpoint / "recipe.yaml"))
