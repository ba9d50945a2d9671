"""The verb `preprocess`: arguments, the progress bar, and the table at the end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from rich.console import Console

from megacode.cli import arguments
from megacode.cli.arguments import at_least, one_of, share, size
from megacode.corpus.preprocess.conditions import parse_condition
from megacode.corpus.preprocess.request import PairForm, Request, TooLongPolicy
from megacode.corpus.workers import available_cores, prepare_workers
from megacode.errors import UserError
from megacode.report.preprocessing import preprocess_visibly
from megacode.tokenizer.chat import BUILT_IN
from megacode.tokenizer.fast import FAST_MODULES

EXAMPLE = """examples:
  megacode preprocess 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output data/corpus
  megacode preprocess my-repository --include '*.py' --tokenizer tokenizer.model \\
    --output data/repository

  SlimPajama, the even-numbered files, a dataset for each subset (Crystal's first half):
    megacode preprocess 'SlimPajama-627B/train/**/*.jsonl.zst' --files 0/2 \\
        --split-by meta.redpajama_set_name --tokenizer tokenizer.model --bos \\
        --added-tokens crystal --output 'data/slimpajama-a/{value}'
  StarCoderData, a dataset for each language (its folders are named so):
    megacode preprocess starcoderdata --text-field content --split-by file.folder \\
        --where 'max_stars_count >= 10' --tokenizer tokenizer.model --added-tokens crystal --bos \\
        --output 'data/starcoder/{value}'

  Conversations (OpenAI messages, ShareGPT, Alpaca, prompt and completion, input and target), by a
  chat template; without --template, by the one beside the tokenizer:
    megacode preprocess chats.jsonl --conversations --tokenizer tokenizer.model \\
        --added-tokens crystal --template crystal --max-tokens 4097 --too-long drop \\
        --output data/chats

--where and --split-by take fields of the records, with dots for nested ones, and of every file:
file.name, file.path (below the folder given), file.suffix, file.folder, file.repository (the first
folder below the one given). If it is killed, the same command goes on where it was. What could not
be read is in OUTPUT.quarantine.jsonl. On several machines with a common disk: the same command with
--shard 0/N, 1/N, ... (slurm/preprocess.sh).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize a corpus (JSONL, parquet, plain files; .gz, .zst; folders, globs) "
        "into a dataset of Megatron-Core."
    )
    yes_no = argparse.BooleanOptionalAction

    group = parser.add_argument_group("what is read")
    arguments.add_corpus(group)
    add = group.add_argument
    add("--files", type=one_of, default="0/1", metavar="I/N", help="every N-th file, from number I")
    add("--where", type=_condition, metavar="EXPR", help='only records like this: "stars >= 10"')
    add("--deduplicate", action=yes_no, default=False, help="keep the first of equal documents")
    add("--max-document", type=size, default="32MiB", metavar="SIZE", help="set longer ones aside")
    add(
        "--max-bad", type=share, default="1%", metavar="SHARE", help="more bad records are an error"
    )

    group = parser.add_argument_group("how it is tokenized")
    arguments.add_tokenizer(group, required=True)
    add = group.add_argument
    add("--bos", action=yes_no, default=False, help="begin-of-sequence token before each document")
    add("--eod", action=yes_no, default=True, help="end-of-document token after each document")
    add("--exact", action="store_true", help="do without the fast backend (same ids; for doubts)")

    add = parser.add_argument_group("conversations and pairs").add_argument
    add("--conversations", action="store_true", help="records are conversations (formats: below)")
    add("--template", metavar="NAME", help=f"chat template: a file, or {', '.join(BUILT_IN)}")
    add("--pairs", choices=get_args(PairForm), help="records are pairs (megacode pairs): members "
        "apart, or a query and a candidate in one sequence")  # fmt: skip
    add("--max-tokens", type=at_least(2), metavar="N", help="of a conversation or a pair")
    policies = get_args(TooLongPolicy)
    add("--too-long", choices=policies, default="error", help="what becomes of longer ones (error)")

    add = parser.add_argument_group("what is written").add_argument
    add("--output", type=Path, required=True, metavar="PREFIX", help="PREFIX.bin, .idx and .json")
    add("--split-by", metavar="FIELD", help="a dataset for each value; {value} may be in PREFIX")
    add("--validation", type=share, default=0.0, metavar="F", help="share held out, by text hash")
    add("--validation-output", type=Path, metavar="PREFIX", help="(PREFIX_validation)")
    add("--shuffle", type=at_least(0), metavar="SEED", help="documents in a random order")
    add("--repository", metavar="FIELD", help="join a repository's files, in order of their paths")
    add("--path", metavar="FIELD", help="with --repository: a file's path in it (file.path, say)")
    add(
        "--shard-size", type=size, metavar="SIZE", help="cut into PREFIX-00000, ... of at most this"
    )
    add("--overwrite", action="store_true", help="replace an output made with other settings")

    add = parser.add_argument_group("how it runs").add_argument
    cores = available_cores()
    add("--workers", type=at_least(1), default=cores, metavar="N", help="processes")
    add("--shard", type=one_of, metavar="I/N", help="do one of N shares of the work, 0/N to N-1/N")


def run(args: argparse.Namespace) -> int:
    """Preprocess. UserError, after all good records are written, if too many are bad."""
    if args.validation == 1:
        raise UserError("--validation 1: leaves nothing to train on; give a share below 1")
    if args.conversations and args.pairs:
        raise UserError("--pairs: a record is a conversation or a pair; give one of the two")
    if args.template and not args.conversations:
        raise UserError("--template: needs --conversations")
    if args.max_tokens and not (args.conversations or args.pairs):
        raise UserError("--max-tokens: needs --conversations or --pairs")
    if args.workers > 1:
        prepare_workers(["megacode.corpus.preprocess.tokenize", *FAST_MODULES])
    output = _prefix(args.output, "--output")
    held_out = args.validation_output and _prefix(args.validation_output, "--validation-output")
    if held_out and os.path.abspath(held_out) == os.path.abspath(output):
        raise UserError(f"--validation-output {held_out}: is --output too; choose another")
    request = Request(
        inputs=tuple(args.inputs),
        tokenizer=arguments.tokenizer_section(args, bos=args.bos, eod=args.eod),
        output=output,
        validation=args.validation,
        validation_output=held_out,
        text_field="" if args.conversations or args.pairs else args.text_field,
        conversations=args.conversations,
        pairs=args.pairs,
        template=args.template,
        max_tokens=args.max_tokens,
        too_long=args.too_long,
        format=args.format,
        include=tuple(args.include),
        every=args.files,
        where=args.where,
        split_by=args.split_by,
        deduplicate=args.deduplicate,
        shuffle=args.shuffle,
        repository=args.repository,
        path=args.path,
        shard_size=args.shard_size,
        max_document=args.max_document,
        exact=args.exact,
        overwrite=args.overwrite,
    )
    console = Console(highlight=False)
    try:
        result = preprocess_visibly(request, args.workers, console, share=args.shard)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    if result.bad_share > args.max_bad:
        raise UserError(
            f"{result.counts.bad.total():,} of {result.counts.records:,} records are bad "
            f"({result.bad_share:.2%}, over --max-bad {100 * args.max_bad:g}%); the good ones are "
            f"in {request.output}, the bad ones with their reasons in {result.quarantine}"
        )
    return 0


def _condition(text: str) -> str:
    parse_condition(text)  # its mistakes are told before anything starts
    return text


def _prefix(path: Path, option: str) -> Path:
    """A prefix, which may be given as one of its files. UserError if it cannot be one."""
    if not path.name.strip("."):
        raise UserError(f"{option} {path}: expected a prefix of file names, {path / 'corpus'} say")
    if "{value}" in str(path.parent):
        named = path.parent.parent / "{value}"
        raise UserError(f"{option} {path}: {{value}} may stand in the name only, {named} say")
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
