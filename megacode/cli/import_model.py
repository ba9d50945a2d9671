"""The verb `megacode import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.recipe.schema import TokenizerSection

EXAMPLE = """examples:
  megacode import ~/models/Llama-2-7b imported/llama-2-7b
  then, in a recipe:  extends: imported/llama-2-7b/recipe.yaml
                      initialize_from: imported/llama-2-7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="a Hugging Face model: config.json and its weights")
    add("output", type=Path, help="checkpoint folder to make, for a recipe's `initialize_from`")


def run(args: argparse.Namespace) -> int:
    from megacode.convert.importing import Found, import_model
    from megacode.terminal import progress_bar

    output = args.output
    if output.exists():
        raise UserError(f"{output}: already there; choose another folder, or remove it")
    found = Found.open(args.folder)
    total = sum(path.stat().st_size for path in set(found.weights.files.values()))
    tokenizer, note = _tokenizer(args.folder, found.vocab_size)
    with progress_bar(f"{args.folder.name} ({found.family.name})", total) as on_bytes:
        recipe = import_model(found, output, tokenizer, on_bytes)
    family = found.family.architecture
    print(f"{output}: a checkpoint of {recipe.name}, {family}, vocabulary {found.vocab_size:,}")
    extends, initialize = f"`extends: {output / 'recipe.yaml'}`", f"`initialize_from: {output}`"
    print(f"A recipe goes on from it with {extends} and {initialize}.")
    for line in filter(None, (*found.notes(), note)):
        print(f"note: {line}")
    return 0


def _tokenizer(folder: Path, vocab_size: int) -> tuple[TokenizerSection | None, str | None]:
    """The folder's tokenizer for the recipe, and what the user should know about it."""
    from megacode.convert.tokenizer_files import has_tokenizer, read_tokenizer

    if not has_tokenizer(folder):
        absent = f"{folder}: has no tokenizer.json or tokenizer.model"
        return None, f"{absent}; give the recipe's `tokenizer.path` yourself"
    return read_tokenizer(folder.resolve(), vocab_size)
