"""A SentencePiece BPE model from documents; the verb `megacode tokenizer train`.

Settings for code and text alike: nothing is normalised, so decode(encode(text)) is the text with its newlines, tabs
and runs of blanks; every byte has a piece, so nothing is unknown; digits stand alone; no blank is put in front of a
document, so that encoding a piece cut out of the middle (fill-in-the-middle) and decoding it gives that piece.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megacode.data.files import replace_file
from megacode.data.inputs import FORMATS, find_inputs
from megacode.data.readers import Document, read_input
from megacode.data.tokenizer import well_formed
from megacode.errors import UserError

# SentencePiece writes these itself (space, unknown, end of piece); its trainer drops a document that holds one.
_RESERVED = str.maketrans({"\u2581": " ", "\u2585": " ", "\0": " "})


def train_tokenizer(
    documents: Iterable[str], path: Path, vocab_size: int = 8000, character_coverage: float = 0.9995
) -> None:
    """Train on `documents` and write the .model to `path`. Equal documents give an equal file.

    `character_coverage` is the share of characters (by count) that get a piece of their own; the rest are bytes. Holds
    the documents in memory: sample a large corpus first (`sample`).
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(well_formed(text).translate(_RESERVED) for text in documents if text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,
            num_threads=2,  # written into the file, so fixed
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no documents"
        detail = reason.rpartition("] ")[2]
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces: {detail} Give more text or fewer pieces."
        ) from None
    with replace_file(path) as file:
        file.write(model.getvalue())


def sample(documents: Iterable[str], share: float) -> Iterator[str]:
    """About `share` (0 to 1) of the documents, chosen by a hash of each, so the same ones whatever their order."""
    limit = int(share * 2**64)
    for text in documents:
        key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, person=b"tokenizer").digest()
        if int.from_bytes(key, "little") < limit:
            yield text


# ------------------------------------------------------------------------------------------------------------ the verb


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
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="JSONL, parquet or plain files, folders, globs")
    train.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the .model goes")
    train.add_argument("--vocab-size", default="8k", metavar="N", help="pieces, bytes and control tokens together (8k)")
    train.add_argument("--character-coverage", type=float, default=0.9995, metavar="F", help="(0.9995)")
    train.add_argument("--max-mb", type=float, default=200.0, metavar="MB", help="train on a sample of this size (200)")
    train.add_argument("--text-field", default="text", metavar="NAME", help="field of the text; a.b for nested (text)")
    train.add_argument("--format", choices=FORMATS, default="auto", help="what the inputs are (auto: by their endings)")
    train.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="in folders: only names like this"
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
                if isinstance(item, Document):
                    yield item.text
                else:
                    counts["bad"] += 1

    def counted() -> Iterator[str]:
        for text in sample(texts(), share):
            counts["documents"] += 1
            counts["bytes"] += len(text)
            status.update(f"reading: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.1f} M characters")
            yield text
        status.update("training (SentencePiece does not say how far it is)")

    with console.status("reading") as status:
        train_tokenizer(counted(), args.output, vocab_size, args.character_coverage)
    console.print(
        f"{args.output}: {vocab_size:,} pieces from {counts['documents']:,} documents "
        f"({counts['bytes'] / 1e6:.1f} M characters, {share:.0%} of the input)"
        + (f"; {counts['bad']:,} bad or empty records left out" if counts["bad"] else "")
        + (f"; {len(links):,} links that lead out of the input or nowhere are not followed" if links else "")
    )
    return 0
