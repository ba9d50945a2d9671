"""The verb `megacode preprocess`: arguments, the progress bar, and the table at the end."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from rich.console import Console

from megacode.corpus.inputs import FORMATS
from megacode.corpus.preprocess.conditions import parse_condition
from megacode.corpus.preprocess.request import Request
from megacode.corpus.workers import available_cores, prepare_workers
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.report.preprocessing import preprocess_visibly
from megacode.tokenizer.fast import FAST_MODULES

EXAMPLE = """examples:
  megacode preprocess 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output data/corpus --validation 0.01
  megacode preprocess my-repository --include '*.py' --tokenizer tokenizer.model --output data/repository

  SlimPajama, the even-numbered files, a dataset for each subset (Crystal's first half):
    megacode preprocess 'SlimPajama-627B/train/**/*.jsonl.zst' --files 0/2 --split-by meta.redpajama_set_name \\
        --tokenizer tokenizer.model --added-tokens crystal --bos --output 'data/slimpajama-a/{value}'
  StarCoderData, a dataset for each language (its folders are named so):
    megacode preprocess starcoderdata --text-field content --split-by file.folder --where 'max_stars_count >= 10' \\
        --tokenizer tokenizer.model --added-tokens crystal --bos --output 'data/starcoder/{value}'

--where and --split-by take fields of the records, with dots for nested ones, and of every file: file.name, file.path
(below the folder given), file.suffix, file.folder, file.repository (the first folder below the one given).
Killed at any moment, the same command goes on where it was. What could not be read is in OUTPUT.quarantine.jsonl.
On several machines with a common disk: the same command with --shard 0/N, 1/N, ... (slurm/preprocess.sh).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megacode preprocess`."""
    parser.description = (
        "Tokenize a corpus (JSONL, parquet, plain files; .gz, .zst; folders, globs) "
        "into a dataset of Megatron-Core."
    )
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    yes_no = argparse.BooleanOptionalAction

    what = parser.add_argument_group("what is read")
    what.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs, @FILE (a list of them), in the order given",
    )
    what.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of the text; a.b for nested (text)",
    )
    what.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="what the inputs are (auto: by their endings)",
    )
    what.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders: only names like this",
    )
    what.add_argument(
        "--files",
        default="0/1",
        metavar="I/N",
        help="every N-th file, beginning with number I: 0/2 the even ones",
    )
    what.add_argument(
        "--where",
        metavar="EXPR",
        help="only records like this: \"stars >= 10 and license in ('mit', 'bsd')\"",
    )
    what.add_argument(
        "--deduplicate",
        action=yes_no,
        default=False,
        help="keep the first of documents of equal text",
    )
    what.add_argument(
        "--max-document",
        default="32MiB",
        metavar="SIZE",
        help="longer records are set aside (32MiB)",
    )
    what.add_argument(
        "--max-bad",
        default="1%",
        metavar="SHARE",
        help="exit code 2 if more of the records are bad, 0.1%% say (1%%)",
    )

    how = parser.add_argument_group("how it is tokenized")
    how.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="SentencePiece .model, tokenizer.json, .tiktoken",
    )
    how.add_argument(
        "--tokenizer-kind",
        choices=("sentencepiece", "huggingface", "tiktoken"),
        help="(by the ending)",
    )
    how.add_argument(
        "--added-tokens",
        default="none",
        metavar="LIST",
        help="`crystal`, or names split by commas: as in the recipe (none)",
    )
    how.add_argument(
        "--bos", action=yes_no, default=False, help="begin-of-sequence token before each document"
    )
    how.add_argument(
        "--eod", action=yes_no, default=True, help="end-of-document token after each document"
    )
    how.add_argument(
        "--exact", action="store_true", help="do without the fast backend (same ids; for doubts)"
    )

    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="PREFIX.bin, .idx and .json are written",
    )
    out.add_argument(
        "--split-by",
        metavar="FIELD",
        help="a dataset for each value; {value} in PREFIX, or PREFIX-VALUE",
    )
    out.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="F",
        help="share held out, by hash of the text (0)",
    )
    out.add_argument("--validation-output", type=Path, metavar="PREFIX", help="(PREFIX_validation)")
    out.add_argument("--shuffle", type=int, metavar="SEED", help="documents in a random order")
    out.add_argument(
        "--repository",
        metavar="FIELD",
        help="make one document of a repository's files, in the order of their paths",
    )
    out.add_argument(
        "--path", metavar="FIELD", help="with --repository: a file's path in it (file.path, say)"
    )
    out.add_argument(
        "--shard-size", metavar="SIZE", help="cut into PREFIX-00000, ... of at most this size: 10GB"
    )
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output that was made from other settings",
    )

    run_group = parser.add_argument_group("how it runs")
    run_group.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes (%(default)s)",
    )
    run_group.add_argument(
        "--shard", metavar="I/N", help="do one of N shares of the work, from 0/N to N-1/N"
    )


def run(args: argparse.Namespace) -> int:
    """`megacode preprocess`. UserError on mistakes and, after all good records are written, on too many bad ones."""
    limit = parse_share(args.max_bad)
    if not 0.0 <= args.validation < 1.0:
        raise UserError(
            f"--validation {args.validation:g}: expected a share of the documents from 0 to below 1, 0.01 say"
        )
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    if args.workers > 1:
        prepare_workers(["megacode.corpus.preprocess.tokenize", *FAST_MODULES])
    if args.where:
        parse_condition(args.where)
    if args.shuffle is not None and args.shuffle < 0:
        raise UserError(f"--shuffle {args.shuffle}: expected a seed of 0 or more")
    added = (
        args.added_tokens
        if args.added_tokens in ("none", "crystal")
        else args.added_tokens.split(",")
    )
    section = schema.TokenizerSection(
        path=args.tokenizer,
        kind=args.tokenizer_kind,
        added_tokens=added,
        bos=args.bos,
        eod=args.eod,
    )
    output = _prefix(args.output, "--output")
    held_out = args.validation_output and _prefix(args.validation_output, "--validation-output")
    if held_out and os.path.abspath(held_out) == os.path.abspath(output):
        raise UserError(f"--validation-output {held_out}: is --output too; choose another")
    request = Request(
        inputs=tuple(args.inputs),
        tokenizer=section,
        output=output,
        validation=args.validation,
        validation_output=held_out,
        text_field=args.text_field,
        format=args.format,
        include=tuple(args.include),
        every=parse_fraction(args.files, "--files"),
        where=args.where,
        split_by=args.split_by,
        deduplicate=args.deduplicate,
        shuffle=args.shuffle,
        repository=args.repository,
        path=args.path,
        shard_size=parse_size(args.shard_size, "--shard-size") if args.shard_size else None,
        max_document=parse_size(args.max_document, "--max-document"),
        exact=args.exact,
        overwrite=args.overwrite,
    )
    console = Console(highlight=False)
    try:
        share = parse_fraction(args.shard, "--shard") if args.shard else None
        result = preprocess_visibly(request, args.workers, console, share=share)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    if result.bad_share > limit:
        raise UserError(
            f"{result.counts.bad.total():,} of {result.counts.records:,} records are bad ({result.bad_share:.2%}, over "
            f"--max-bad {args.max_bad}); the good ones are in {request.output}, the bad ones with their reasons in "
            f"{result.quarantine}"
        )
    return 0


def parse_share(text: str) -> float:
    """`0.1%` -> 0.001; `0.001` -> 0.001. UserError for anything outside 0 to 1."""
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UserError(f"--max-bad {text}: expected a share of the records, such as 0.1% or 0.001")
    return share


def parse_fraction(text: str, option: str) -> tuple[int, int]:
    """`0/8` -> (0, 8). UserError unless it is one of n, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            f"{option} {text}: expected I/N, one of N counted from 0: 0/4, 1/4, 2/4 or 3/4"
        )
    return int(match[1]), int(match[2])


def parse_size(text: str, option: str) -> int:
    """`10GB` -> 10^10, `32MiB` -> 2^25, a bare number is bytes. UserError for anything else, and for 0."""
    units = {
        "": 1,
        "k": 10**3,
        "M": 10**6,
        "G": 10**9,
        "T": 10**12,
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": 2**30,
        "Ti": 2**40,
    }
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?|[KMGT]i)B?", text)
    size = int(float(match[1]) * units[match[2]]) if match else 0
    if not size:
        raise UserError(
            f"{option} {text}: expected a size in bytes, such as 10GB, 512MiB or 1000000"
        )
    return size


def _prefix(path: Path, option: str) -> Path:
    """A prefix may be given as one of its files."""
    if not path.name or path.name == "..":
        raise UserError(f"{option} {path}: expected a prefix of file names, {path / 'corpus'} say")
    if "{value}" in str(path.parent):
        raise UserError(
            f"{option} {path}: {{value}} may stand in the name only, {path.parent.parent / '{value}'} say"
        )
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
