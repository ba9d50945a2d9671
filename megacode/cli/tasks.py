"""The verb `tasks`: write the tasks of a probe from a seed, or list the probes."""

from __future__ import annotations

import argparse
from pathlib import Path

from megacode.cli.arguments import at_least
from megacode.corpus.workers import readable_errors
from megacode.errors import UserError
from megacode.evaluate.probes import MAKERS, make_probe
from megacode.terminal import print_table, table_console, table_of

EXAMPLE = """examples:
  megacode tasks list
  megacode tasks make brackets copying --seed 1 --out tasks
  megacode tasks make boxes --seed 1 --items 500 --out tasks   # with records to tune on"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="the probes", description="The probes.")
    about = "write the tasks of probes, and what a model is tuned on for them"
    make = actions.add_parser("make", help=about, description=about, epilog=EXAMPLE)
    make.formatter_class = parser.formatter_class
    add = make.add_argument
    add("names", nargs="+", choices=list(MAKERS), metavar="NAME", help="; ".join(MAKERS))
    add("--seed", type=int, required=True, metavar="N", help="the same seed gives the same files")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    add("--items", type=at_least(1), metavar="N", help="of each task (the probe's number)")


def run(args: argparse.Namespace) -> int:
    console = table_console()
    if args.action == "list":
        table = table_of("probes", "name", "asks", "items of a task", left=2)
        for name, (_, items, about) in MAKERS.items():
            table.add_row(name, about, f"{items:,}")
        print_table(console, table)
        return 0
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is no folder; give another")
    table = table_of("", "file", "group", "items", left=2)
    for name in args.names:
        with readable_errors():
            written = make_probe(name, args.seed, args.out, args.items)
        for one in written:
            for number, (group, items) in enumerate(one.groups.items()):
                table.add_row("" if number else str(one.path), group, f"{items:,}")
            for baseline, accuracy in one.task.baselines.items():
                table.add_row("", f"{baseline}: accuracy", f"{accuracy:.3f}")
        for records in sorted(args.out.glob(f"{name}.*.jsonl")):
            table.add_row(str(records), "to tune on", f"{records.read_bytes().count(10):,}")
    print_table(console, table)
    return 0
