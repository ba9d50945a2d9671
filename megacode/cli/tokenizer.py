"""The verb `tokenizer train`: a SentencePiece model from a corpus."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from megacode.cli.arguments import add_corpus
from megacode.corpus.inputs import find_inputs
from megacode.corpus.readers import TextDocument, read_input
from megacode.errors import UserError
from megacode.recipe.section import parse_count
from megacode.tokenizer.training import sample, train_tokenizer

EXAMPLE = """examples:
  megacode tokenizer train 'data/quickstart/gathered/*.jsonl' --vocab-size 8k \\
    --output my-tokenizer.model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "a SentencePiece BPE model with byte fallback; its round trip is exact"
    train = actions.add_parser("train", help=about, description=about, epilog=EXAMPLE)
    train.formatter_class = parser.formatter_class
    add_corpus(train)
    add = train.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="where the .model goes")
    add("--vocab-size", default="8k", metavar="N", help="pieces, bytes and control tokens")
    add("--character-coverage", type=float, default=0.9995, metavar="F", help="covered by pieces")
    add("--max-mb", type=float, default=200.0, metavar="MB", help="train on a sample of this size")


def run(args: argparse.Namespace) -> int:
    console = Console()
    if args.output.suffix != ".model":
        raise UserError(f"--output {args.output}: a SentencePiece file ends in .model")
    try:
        vocab_size = parse_count(args.vocab_size)
    except ValueError as error:
        raise UserError(f"--vocab-size: {error}") from None
    links: list[Path] = []
    files = find_inputs(args.inputs, args.format, args.include, on_link=links.append)
    share = min(1.0, args.max_mb * 1e6 / max(sum(file.size for file in files), 1))
    bad: Counter[str] = Counter()
    documents = characters = 0

    def texts() -> Iterator[str]:
        for file in files:
            for item in read_input(file, args.text_field):
                if isinstance(item, TextDocument):
                    yield item.text
                else:
                    bad[item.reason] += 1

    def counted() -> Iterator[str]:
        nonlocal documents, characters
        for text in sample(texts(), share):
            documents += 1
            characters += len(text)
            status.update(f"reading: {documents:,} documents, {characters / 1e6:.1f} M characters")
            yield text
        status.update("training (SentencePiece does not say how far it is)")

    with console.status("reading") as status:
        found = counted()
        if (first := next(found, None)) is None:
            why = ", ".join(f"{number:,} × {reason}" for reason, number in bad.most_common(3))
            raise UserError(f"no text to train on: {why or 'the inputs are empty'}")
        train_tokenizer(
            itertools.chain([first], found), args.output, vocab_size, args.character_coverage
        )
    said = f"{args.output}: {vocab_size:,} pieces from {documents:,} documents "
    said += f"({characters / 1e6:.1f} M characters, {share:.0%} of the input)"
    said += f"; {bad.total():,} bad or empty records left out" if bad else ""
    outside = "links that lead out of the input or nowhere are not followed"
    console.print(said + (f"; {len(links):,} {outside}" if links else ""))
    return 0
