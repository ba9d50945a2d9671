"""The verb `megacode import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode import ~/models/Llama-2-7b imported/llama-2-7b
  then, in a recipe:  extends: imported/llama-2-7b/recipe.yaml
                      initialize_from: imported/llama-2-7b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a Hugging Face model: config.json and its weights")
    parser.add_argument("output", type=Path, help="checkpoint folder to make, for a recipe's `initialize_from`")


def run(args: argparse.Namespace) -> int:
    from megacode.convert.importing import Found, import_model
    from megacode.convert.progress import byte_bar

    if args.output.exists():
        raise UserError(f"{args.output}: already there; choose another folder, or remove it")
    found = Found.open(args.folder)
    total = sum(path.stat().st_size for path in set(found.weights.files.values()))
    with byte_bar(f"{args.folder.name} ({found.family.name})", total) as on_bytes:
        recipe = import_model(found, args.output, None, on_bytes)
    print(f"{args.output}: a checkpoint of {recipe.name}, {found.family.architecture}, vocabulary {found.vocab_size:,}")
    print(
        f"A recipe goes on from it with `extends: {args.output / 'recipe.yaml'}` and `initialize_from: {args.output}`."
    )
    return 0
