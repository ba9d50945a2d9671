"""A checkpoint of any parallel layout -> a Hugging Face folder, tensor by tensor.

1. `ExportSource.open` reads the checkpoint's recipe and index; `Wanted` says how it is exported.
2. The tokenizer's files and the chat template (`templates`) are written, and the first proven
   (`tokenizer_files`, `kept`): what cannot be said is told before minutes of weights.
3. The weights: each slot of the family (`layout`) is read (`checkpoint_reader`), cut, written
   (`safetensors_files`).
4. config.json, generation_config.json, the remote code, the model card (`card`).
"""

from __future__ import annotations

import contextlib
import operator
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.checkpoint_reader import CheckpointReader
from megacode.convert.families import choose
from megacode.convert.family import Family
from megacode.convert.kept import GENERATION, outgoing
from megacode.convert.layout import EMBEDDING, Slot, shape, unpadded
from megacode.convert.new_folder import new_folder
from megacode.convert.safetensors_files import Planned, write_files
from megacode.convert.templates import template_of_export, turn_end_of
from megacode.convert.tokenizer_files import loads_differently, token_ids, write_tokenizer
from megacode.errors import UserError
from megacode.files import write_json
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import Model, Recipe
from megacode.run.checkpoints import AVERAGES, find_checkpoint, read_info
from megacode.tokenizer.tokenizer import load_tokenizer

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
        """A run's latest checkpoint, or the one given. UserError: there is none that is whole."""
        checkpoint = find_checkpoint(path)
        info = read_info(checkpoint)
        if not (checkpoint / "recipe.yaml").is_file():
            raise UserError(
                f"{checkpoint}: has no recipe.yaml, so its model is not known; "
                "copy the run's recipe.yaml into it"
            )
        recipe = load_recipe(checkpoint / "recipe.yaml")
        recipe = recipe.model_copy(update={"model": recipe.model_in(info.get("phase"))})
        vocab_size = info.get("vocab_size") or recipe.model.vocab_size
        if not vocab_size:
            raise UserError(
                f"{checkpoint / 'recipe.yaml'}: model.vocab_size: is not given, and megacode.json "
                "does not say; add it"
            )
        return cls(checkpoint, info, recipe, CheckpointReader.open(checkpoint), int(vocab_size))

    @property
    def model(self) -> Model:
        return self.recipe.model

    @property
    def length(self) -> int:
        """The model's longest sequence."""
        assert self.model.context_length is not None  # `Recipe.model_in`
        return self.model.context_length

    @property
    def run(self) -> Path | None:
        """The run that the checkpoint lies in."""
        folder = self.checkpoint.resolve().parent
        in_run = (
            folder.name in ("checkpoints", AVERAGES) and (folder.parent / "recipe.yaml").is_file()
        )
        return folder.parent if in_run else None

    def check(self, slot: Slot) -> None:
        """UserError unless the checkpoint's tensor has the shape that the recipe says, or more."""
        wanted = shape(self.model, self.vocab_size, slot.key, self.length)
        stored = self.reader.shape(slot.key, slot.layer)
        enough = len(stored) == len(wanted) and all(map(operator.ge, stored, wanted))
        empty = torch.empty(stored, device="meta")
        if not enough or unpadded(self.model, self.vocab_size, slot.key, empty).shape != wanted:
            raise UserError(
                f"{self.checkpoint}: {slot.key} has shape {stored}, and recipe.yaml asks for "
                f"{wanted}; the two belong to different models"
            )

    def planned(self, slot: Slot, dtype: torch.dtype) -> list[Planned]:
        """The Hugging Face tensors of a slot, by the recipe alone."""
        size = shape(self.model, self.vocab_size, slot.key, self.length)
        parts = slot.form.split(self.model, torch.empty(size, device="meta"))
        return [
            Planned(name, tuple(part.shape), dtype)
            for name, part in zip(slot.names, parts, strict=True)
        ]

    def tensors(self, slot: Slot) -> list[Tensor]:
        """Those tensors."""
        stored = self.reader.tensor(slot.key, slot.layer)
        return slot.form.split(self.model, unpadded(self.model, self.vocab_size, slot.key, stored))


@dataclass(frozen=True)
class Wanted:
    """How exports are to be made.

    Attributes:
        family: name of the family; None is the first that fits.
        dtype: `bf16`, `fp16`, `fp32`; None is as stored.
        tokenizer: whether to write tokenizer files, where the recipe names a tokenizer.
        chat_template: a built-in one's name, or a file; None is `template_of_export`'s choice.
    """

    family: str | None = None
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    tokenizer: bool = True
    chat_template: str | None = None

    def family_of(self, source: ExportSource) -> Family:
        """UserError: the model fits no family, or not the one asked for."""
        return choose(source.model, self.family, str(source.checkpoint / "recipe.yaml"))

    def dtype_of(self, source: ExportSource) -> torch.dtype:
        return DTYPES[self.dtype] if self.dtype else source.reader.dtype(EMBEDDING)

    def nbytes(self, source: ExportSource) -> int:
        """Of the weights that an export writes."""
        slots, dtype = self.family_of(source).slots(source.model), self.dtype_of(source)
        return sum(planned.nbytes for slot in slots for planned in source.planned(slot, dtype))


def export(
    source: ExportSource,
    out: Path,
    wanted: Wanted,
    on_bytes: Callable[[int], None] = lambda count: None,
    last: Callable[[Path], None] = lambda folder: None,
) -> list[str]:
    """Write the folder, whole or not at all.

    Args:
        on_bytes: told how much of the weights has been written.
        last: called with the folder before it gets its name, once everything else is in it.

    Returns:
        what the user should know, in sentences.

    Raises:
        UserError: the model fits no family, the tokenizer cannot be said in a tokenizer.json, there
            is no such chat template, the checkpoint is damaged or not its recipe's, or `out` cannot
            be written.
    """
    from megacode.convert.card import write_card  # plots: matplotlib

    family, dtype = wanted.family_of(source), wanted.dtype_of(source)
    slots = list(family.slots(source.model))
    section, tokenizer, notes = source.recipe.tokenizer, None, []
    template, is_other, turn_end = None, False, None
    if section is None:
        notes.append("the recipe names no tokenizer, so none is in the export")
    elif wanted.tokenizer:
        tokenizer = load_tokenizer(section)
        template, is_other = template_of_export(source.recipe, tokenizer, wanted.chat_template)
    else:
        with contextlib.suppress(UserError):  # its file may be elsewhere
            tokenizer = load_tokenizer(section)
    if wanted.chat_template and not template:
        raise UserError("--chat-template: goes with a tokenizer, and none is in the export")
    if template and tokenizer:
        turn_end, note = turn_end_of(template, tokenizer)
        notes += [note] if note else []
    about = outgoing(
        source.info.get("imported"),
        token_ids(tokenizer),
        tokenizer,
        turn_end,
        chats=template is not None,
    )
    if about.note:
        notes.append(about.note)
    with new_folder(out) as folder:
        for slot in slots:
            source.check(slot)
        if section and wanted.tokenizer:
            text = template.text if template and is_other else None
            write_tokenizer(section, folder, source.vocab_size, text)
        planned = [source.planned(slot, dtype) for slot in slots]
        write_files(
            folder, planned, lambda n: source.tensors(slots[n]), wanted.shard_bytes, on_bytes
        )
        write_json(folder / "config.json", _config(source, family, dtype, about.ids), durable=False)
        write_json(folder / GENERATION, about.generation, durable=False)
        for name in family.remote_code:
            shutil.copyfile(Path(__file__).parent / "crystalcoder" / name, folder / name)
        if section and wanted.tokenizer and (note := loads_differently(section, folder)):
            notes.append(note)
        write_card(folder, source.recipe, source.checkpoint, source.run, family.name, out.name)
        last(folder)
    return notes


def _config(
    source: ExportSource, family: Family, dtype: torch.dtype, ids: dict[str, Any]
) -> dict[str, Any]:
    """config.json; `ids` of special tokens."""
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": source.vocab_size,
        "tie_word_embeddings": source.model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **ids,
        **family.config(source.model, source.length),
    } | ids
