"""What `initialize_from` may name beside a checkpoint: a Hugging Face folder.

Every rank compares its config.json with the recipe (`open_origin`). When weights are loaded, rank 0
makes a checkpoint of it in the run's folder, all ranks load that in any layout, and it is removed
(`as_checkpoint`).
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megacode.convert.importing import Found, import_model, starting_recipe
from megacode.convert.tokenizer_files import difference, has_tokenizer
from megacode.errors import UserError
from megacode.recipe.schema import Recipe, TokenizerSection
from megacode.run.checkpoints import INFO
from megacode.run.history import Origin, open_checkpoint
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

_PLACE = "imported"
"""Of the checkpoint in the run's folder."""


def is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / INFO).is_file()


def open_origin(path: Path) -> Origin:
    """A run's latest checkpoint, a checkpoint, or a Hugging Face folder.

    Raises:
        UserError: it is none of them, or a model that cannot be imported.
    """
    if not is_hugging_face(path):
        return open_checkpoint(path)
    found = Found.open(path)
    recipe = starting_recipe(found, None, found.dtype)
    return Origin(path, found.info(_tokenizer_of(path)), recipe)


@contextlib.contextmanager
def as_checkpoint(
    origin: Path,
    run: Path,
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    is_main: bool,
    say: Callable[[str], None],
) -> Iterator[Path]:
    """The origin's weights as a checkpoint folder for the time of the block. Collective.

    Args:
        run: folder in which rank 0 imports a Hugging Face folder.
        tokenizer: the recipe's.
        say: told what the import changes.

    Raises:
        UserError: on all ranks, a weight does not fit or the folder cannot be written.
    """
    if not is_hugging_face(origin):
        yield origin
        return
    place, mistake = run / _PLACE, [""]
    try:
        if is_main:
            for left in (place, *run.glob(f".{_PLACE}.*.tmp")):  # of a start that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                _import(Found.open(origin), place, recipe, tokenizer, say)
            except UserError as error:
                mistake = [str(error)]
        torch.distributed.broadcast_object_list(mistake, src=0)
        if mistake[0]:
            raise UserError(mistake[0])
        yield place
        torch.distributed.barrier()
    finally:
        if is_main:
            shutil.rmtree(place, ignore_errors=True)


def _import(
    found: Found,
    place: Path,
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> None:
    # Stored so that the recipe's tensor-parallel size divides it.
    multiple = math.lcm(recipe.model.pad_multiple, recipe.parallel.tensor)
    model = found.model.model_copy(update={"pad_multiple": multiple})
    size = sum(path.stat().st_size for path in set(found.weights.files.values()))
    say(f"importing {found.folder} ({found.family.name}, {size / 1e9:,.2f} GB) into {place}")
    for note in found.notes():
        say(f"note: {note}")
    theirs = _tokenizer_of(found.folder)
    if tokenizer and theirs and (other := difference(theirs, tokenizer)):
        say(
            f"WARNING: the recipe's tokenizer is not that of the weights, whose rows then belong "
            f"to other tokens: {other}"
        )
    elif tokenizer and not theirs:
        say(f"note: {found.folder} has no tokenizer to compare {tokenizer.path} with")
    import_model(replace(found, model=model), place, None)
    dtype, compute = str(found.dtype).removeprefix("torch."), recipe.precision.compute
    say(f"imported as {dtype}, for a run in {compute}; {place} is removed when it is loaded")


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    if not has_tokenizer(folder):
        return None
    return load_tokenizer(TokenizerSection(path=str(folder)))
