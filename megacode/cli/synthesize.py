"""The verb `synthesize`: arguments, an estimate or the run, and what a person sees."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from megacode.cli.arguments import add_overrides, one_of
from megacode.terminal import table_console

EXAMPLE = """examples:
  megacode synthesize my-tutorship.yaml --dry-run    # requests, tokens and price, nothing sent
  megacode synthesize my-tutorship.yaml
  megacode synthesize my-tutorship.yaml --shard 0/4  # one of four processes, with its own files

Every reply is kept in the output's journal: after a kill the same command goes on, and what was
paid for is not asked again. API keys come from environment variables alone (models.ROLE.key names
one). docs/synthesis.md says how models are served.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "New problem-solving records from served models. An operator asks them about each record\n"
        "of the inputs; what passes its checks becomes rows that `megacode preprocess` reads."
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="inputs, operator, models")
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print an estimate; send nothing, write nothing")
    add("--shard", type=one_of, metavar="I/N", help="one of N shares of the records")
    add_overrides(parser, "the file, such as target=100; paths are relative to it")
    add("--overwrite", action="store_true", help="replace rows that other settings made")


def run(args: argparse.Namespace) -> int:
    """Estimate or synthesize."""
    from megacode.report.synthesis import print_estimate, synthesize_visibly
    from megacode.synthesize.estimate import estimate
    from megacode.synthesize.make import open_synthesis

    opened = open_synthesis(args.file, args.shard or (0, 1), args.overrides)
    console = table_console()
    if args.dry_run:
        print_estimate(opened, estimate(opened), console)
        return 0
    try:
        synthesize_visibly(opened, args.overwrite, console)
    except KeyboardInterrupt:
        Console(highlight=False).print("stopped; the same command goes on from here")
        return 130
    return 0
