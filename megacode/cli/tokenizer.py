"""The verb `megacode tokenizer train`: a SentencePiece model from a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacode.corpus.inputs import FORMATS, find_inputs
from megacode.corpus.readers import TextDocument, read_input
from megacode.errors import UserError
from megacode.tokenizer.training import sample, train_tokenizer

EXAMPLE = """examples:
  megacode tokenizer train 'data/quickstart/gathered/*.jsonl' --vocab-size 8k --output my-tokenizer.model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megacode tokenizer train`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train",
        help="a SentencePiece BPE model from documents",
        description="Train a SentencePiece BPE tokenizer with byte fallback: exact round trip, digits apart.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="JSONL, parquet or plain files, folders, globs"
    )
    train.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="where the .model goes"
    )
    train.add_argument(
        "--vocab-size",
        default="8k",
        metavar="N",
        help="pieces, bytes and control tokens together (8k)",
    )
    train.add_argument(
        "--character-coverage", type=float, default=0.9995, metavar="F", help="(0.9995)"
    )
    train.add_argument(
        "--max-mb",
        type=float,
        default=200.0,
        metavar="MB",
        help="train on a sample of this size (200)",
    )
    train.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of the text; a.b for nested (text)",
    )
    train.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="what the inputs are (auto: by their endings)",
    )
    train.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders: only names like this",
    )


def run(args: argparse.Namespace) -> int:
    """`megacode tokenizer train`; UserError on mistakes."""
    from rich.console import Console

    from megacode.recipe.section import parse_count

    console = Console()
    if args.output.suffix != ".model":
        raise UserError(f"--output {args.output}: a SentencePiece file ends in .model")
    try:
        vocab_size = parse_count(args.vocab_size)
    except ValueError as error:
        raise UserError(f"--vocab-size: {error}") from None
    links: list[Path] = []
    files = find_inputs(args.inputs, args.format, args.include, on_link=links.append)
    size = sum(file.size for file in files)
    share = min(1.0, args.max_mb * 1e6 / max(size, 1))
    counts: dict[str, Any] = {"documents": 0, "bytes": 0, "bad": 0}

    def texts() -> Iterator[str]:
        for file in files:
            for item in read_input(file, args.text_field):
                if isinstance(item, TextDocument):
                    yield item.text
                else:
                    counts["bad"] += 1

    def counted() -> Iterator[str]:
        for text in sample(texts(), share):
            counts["documents"] += 1
            counts["bytes"] += len(text)
            status.update(
                f"reading: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} M characters"
            )
            yield text
        status.update("training (SentencePiece does not say how far it is)")

    with console.status("reading") as status:
        train_tokenizer(counted(), args.output, vocab_size, args.character_coverage)
    console.print(
        f"{args.output}: {vocab_size:,} pieces from {counts['documents']:,} documents "
        f"({counts['bytes'] / 1e6:.1f} M characters, {share:.0%} of the input)"
        + (f"; {counts['bad']:,} bad or empty records left out" if counts["bad"] else "")
        + (
            f"; {len(links):,} links that lead out of the input or nowhere are not followed"
            if links
            else ""
        )
    )
    return 0
