"""An export with everything that belongs to it: weights and configs, tokenizer files, model card."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megacode.convert.export import DTYPES, ExportSource, chosen_family, export, stored_dtype
from megacode.convert.family import Family
from megacode.convert.kept import outgoing
from megacode.convert.tokenizer_files import loads_differently, token_ids, write_tokenizer
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

Extra = Callable[[Path], None]


@dataclass(frozen=True)
class Wanted:
    """How exports are to be made.

    Attributes:
        family: name of the family; None is the first that fits.
        dtype: `bf16`, `fp16`, `fp32`; None is as stored.
        tokenizer: whether to write tokenizer files, where the recipe names a tokenizer.
    """

    family: str | None = None
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    tokenizer: bool = True

    def family_of(self, source: ExportSource) -> Family:
        return chosen_family(source, self.family)

    def dtype_of(self, source: ExportSource) -> torch.dtype:
        return DTYPES[self.dtype] if self.dtype else stored_dtype(source)


def complete_export(
    source: ExportSource, out: Path, wanted: Wanted, on_bytes: Callable[[int], None] = lambda count: None,
    last: Extra = lambda folder: None,
) -> list[str]:  # fmt: skip
    """Write the folder, whole or not at all.

    Args:
        last: called with the folder, before it gets its name, once everything else is in it.

    Returns:
        what the user should know, in sentences.

    Raises:
        UserError: the model fits no family, the tokenizer cannot be said in a tokenizer.json, the checkpoint is damaged.
    """
    from megacode.convert.card import write_card  # plots: matplotlib

    family = wanted.family_of(source)
    section = source.recipe.tokenizer
    notes: list[str] = []
    tokenizer: Tokenizer | None = None
    if section is None:
        notes.append("the recipe names no tokenizer, so none is in the export")
    elif not wanted.tokenizer:
        with contextlib.suppress(UserError):  # its file may be elsewhere
            tokenizer = load_tokenizer(section)
    else:
        tokenizer = load_tokenizer(section)
    about = outgoing(source.info.get("imported"), token_ids(tokenizer), tokenizer)
    if about.note:
        notes.append(about.note)
    prepared = tempfile.TemporaryDirectory()
    if (
        section is not None and wanted.tokenizer
    ):  # what cannot be is told before a minute of weights
        write_tokenizer(section, Path(prepared.name), source.vocab_size)

    def extra(folder: Path) -> None:
        # copytree would make the folder as private as a temporary one
        for path in filter(Path.is_file, Path(prepared.name).rglob("*")):
            copy = folder / path.relative_to(prepared.name)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if (
            section is not None
            and wanted.tokenizer
            and (note := loads_differently(section, folder))
        ):
            notes.append(note)
        write_card(
            folder,
            source.recipe,
            source.checkpoint,
            run_of(source.checkpoint),
            family.name,
            out.name,
        )
        last(folder)

    with prepared:
        export(
            source, out, family, wanted.dtype_of(source), wanted.shard_bytes, on_bytes, about, extra
        )
    return notes


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in."""
    run = checkpoint.resolve().parent.parent
    return (
        run
        if checkpoint.resolve().parent.name == "checkpoints" and (run / "recipe.yaml").is_file()
        else None
    )
