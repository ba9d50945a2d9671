"""The verb `pairs`: arguments, the progress bar, and the tables at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from megacode.cli import arguments
from megacode.cli.arguments import at_least, share
from megacode.corpus.pairs.languages import LANGUAGES
from megacode.corpus.pairs.records import DIFFERENT, KINDS
from megacode.corpus.pairs.request import PairRequest
from megacode.corpus.preprocess.conditions import parse_condition
from megacode.corpus.workers import available_cores, prepare_workers
from megacode.errors import UserError
from megacode.report.pairs import make_pairs_visibly
from megacode.terminal import table_console

EXAMPLE = f"""examples:
  megacode pairs data/quickstart/gathered/code.jsonl --where "startswith(path, 'json/')" \\
    --out data/pairs/code.jsonl --validation 0.2 --hold-out operator-flipped
  megacode pairs my-repository --include '*.py' --out data/pairs/repository.jsonl
  megacode pairs data/quickstart/python/valid --language python --out data/pairs/dataset.jsonl
  megacode inspect data/pairs/code.jsonl --documents 0,1

Kinds of candidates: {", ".join(KINDS)}.
solution needs --problem-field; rewritten (Python) needs --generator-field, or --unproven. With
either field a document is one solution, else its functions are taken. The inputs' generator is
Python whose last function takes a random.Random and returns the arguments; programs are run in a
sandbox. If it is killed, the same command goes on where it was. docs/pairs.md says more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make pairs of a corpus of code (or of a dataset PREFIX): functions, each with candidates "
        "that compute the same and candidates that do not."
    )
    group = parser.add_argument_group("what is read")
    arguments.add_corpus(group)
    add = group.add_argument
    add("--where", metavar="EXPR", help='only records like this: "stars >= 10"')
    add("--path", default="path", metavar="FIELD", help="a document's path; a file has its own")
    languages = f"{', '.join(LANGUAGES)}, or a field that has it (by the path's ending)"
    add("--language", metavar="NAME", help=languages)
    add("--problem-field", metavar="FIELD", help="the problem that a document solves")
    add("--generator-field", metavar="FIELD", help="source that makes inputs")
    arguments.add_tokenizer(group, required=False)

    add = parser.add_argument_group("which functions").add_argument
    add("--min-lines", type=at_least(1), default=3, metavar="N", help="that are not blank")
    add("--max-lines", type=at_least(1), default=60, metavar="N", help="that are not blank")
    add("--min-names", type=at_least(0), default=3, metavar="N", help="that can be renamed")

    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="FILE.jsonl; beside it FILE.json")
    add("--validation", type=share, default=0.0, metavar="F", help="share of files or problems")
    add("--validation-out", type=Path, metavar="FILE", help="(FILE.validation.jsonl)")
    add("--kinds", type=_kinds, metavar="LIST", help="split by commas (all)")
    add("--hold-out", type=_kinds, metavar="LIST", help="kinds for validation alone")
    add("--unproven", action="store_true", help="offer rewritten without having run it")
    add("--seed", type=at_least(0), default=0, metavar="N")
    add("--overwrite", action="store_true", help="replace an output made with other settings")

    add = parser.add_argument_group("how it runs").add_argument
    add("--workers", type=at_least(1), default=available_cores(), metavar="N", help="processes")


def run(args: argparse.Namespace) -> int:
    """Make the pairs."""
    if args.where:
        parse_condition(args.where)
    if args.validation == 1:
        raise UserError("--validation 1: leaves nothing to train on; give a share below 1")
    if args.hold_out and not args.validation:
        raise UserError("--hold-out: goes into the validation file alone; give --validation too")
    if not args.validation and args.validation_out:
        raise UserError("--validation-out: give --validation F, the share that goes there")
    asked, hold_out = args.kinds or (), args.hold_out or ()
    if "solution" in asked and not args.problem_field:
        raise UserError("--kinds solution: give --problem-field, which says what solves the same")
    if "rewritten" in asked and not (args.generator_field or args.unproven):
        raise UserError(
            "--kinds rewritten: is offered where it is proven by running; give --generator-field, "
            "or --unproven to do without"
        )
    left = set(args.kinds or KINDS) - set(hold_out)
    if not left & set(DIFFERENT) or not left - set(DIFFERENT):
        raise UserError(
            "--kinds: leaves no equivalent or no non-equivalent candidate to train on; "
            f"name one of each of {', '.join(KINDS)}"
        )
    if args.workers > 1:
        prepare_workers(["megacode.corpus.pairs.drafts"])
    request = PairRequest(
        inputs=tuple(args.inputs),
        output=args.out,
        validation=args.validation,
        validation_output=args.validation_out,
        kinds=args.kinds or KINDS,
        hold_out=hold_out,
        seed=args.seed,
        text_field=args.text_field,
        format=args.format,
        include=tuple(args.include),
        where=args.where or "",
        path_field=args.path,
        language=args.language or "",
        problem_field=args.problem_field or "",
        generator_field=args.generator_field or "",
        unproven=args.unproven,
        min_lines=args.min_lines,
        max_lines=args.max_lines,
        min_names=args.min_names,
        tokenizer=arguments.tokenizer_section(args) if args.tokenizer else None,
        overwrite=args.overwrite,
    )
    try:
        make_pairs_visibly(request, args.workers, table_console())
    except KeyboardInterrupt:
        Console(highlight=False).print("stopped; the same command goes on from here")
        return 130
    return 0


def _kinds(text: str) -> tuple[str, ...]:
    found = text.split(",")
    for one in found:
        if one not in KINDS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, not {one}")
    return tuple(kind for kind in KINDS if kind in found)
