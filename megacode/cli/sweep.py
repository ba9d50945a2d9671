"""The verb `sweep`: train many variants of a recipe and compare them on one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.cli.arguments import at_least
from megacode.errors import UserError
from megacode.launch import STOPPED
from megacode.terminal import table_console

if TYPE_CHECKING:
    from megacode.studies.sweep import OpenSweep

EXAMPLE = """examples:
  megacode plan recipes/sweeps/code-share-tiny.yaml --price 2.5
  megacode sweep recipes/sweeps/code-share-tiny.yaml
  megacode sweep recipes/sweeps/code-share-tiny.yaml --list

Started again, it goes on with the cells that are not finished. docs/sweeps.md has the file.
Exit codes: 0 every cell is finished (or submitted); 1 a cell failed; 75 stopped by a signal, the
cells in training have saved; 2 a mistake that the message names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sweep", type=Path, help="sweep file (YAML)")
    add("--jobs", type=at_least(1), metavar="N", help="cells at a time (as devices or cores allow)")
    each = "of each cell (as many as hold its model once)"
    add("--processes", type=at_least(1), metavar="N", help=each)
    way = parser.add_mutually_exclusive_group()
    add = way.add_argument
    add("--list", action="store_true", help="print each cell's state, step and loss; train nothing")
    add("--results", action="store_true", help="write the page of what is finished; train nothing")
    submit = "submit the unfinished cells as a job array of this script: slurm/sweep.sh"
    add("--sbatch", type=Path, metavar="SCRIPT", help=submit)
    prepare = "for that script: prepare a cell, print the arguments of megacode train"
    add("--cell", metavar="NAME", help=prepare)


def run(args: argparse.Namespace) -> int:
    from megacode.studies.sweep import open_sweep

    sweep = open_sweep(args.sweep)
    if args.list:
        from megacode.studies.tables import print_states

        print_states(sweep, table_console())
    elif args.results:
        show_results(sweep)
    elif args.sbatch:
        from megacode.studies.array import submit

        print("\n".join(submit(sweep, args.sbatch)))
    elif args.cell:
        _prepare(sweep, args.cell)
    else:
        return _train(sweep, args)
    return 0


def _train(sweep: OpenSweep, args: argparse.Namespace) -> int:
    from megacode.studies.pool import slots_for, train_cells
    from megacode.studies.state import unfinished
    from megacode.studies.tables import print_failures

    console = table_console()
    slots = slots_for(sweep, args.jobs, args.processes)
    todo = unfinished(sweep)
    each = f"{slots.processes} process{'es' * (slots.processes > 1)} each"
    console.print(
        f"{sweep.sweep.name}: {len(sweep.cells)} cells, {len(todo)} trainings to do, "
        f"{slots.jobs} at a time, {each}, in {sweep.runs}"
    )
    outcome = train_cells(sweep, slots, args.processes, console)
    show_results(sweep)
    if outcome.failed:
        console.print(f"{len(outcome.failed)} failed; the same command tries them again:")
        print_failures(outcome.failed, console)
    left = bool(unfinished(sweep))
    if outcome.stopped and left:
        console.print("stopped by a signal; the same command goes on")
        return STOPPED
    return 1 if outcome.failed else STOPPED if left else 0


def show_results(sweep: OpenSweep) -> None:
    """Print what the finished cells measured, and write it and the page."""
    from megacode.studies.compare import compare
    from megacode.studies.page import write_page
    from megacode.studies.results import collect, write_results
    from megacode.studies.tables import print_results

    console, results = table_console(), collect(sweep)
    metrics = compare(sweep, results)
    print_results(sweep, metrics, console)
    paths = [*write_results(sweep, results), write_page(sweep, results, metrics)]
    console.print(
        f"{len(results)} of {len(sweep.cells)} cells finished: {', '.join(map(str, paths))}"
    )


def _prepare(sweep: OpenSweep, name: str) -> None:
    from megacode.studies.pool import arguments, prepare

    cell = next((one for one in sweep.all_cells if one.name == name), None)
    if cell is None:
        raise UserError(
            f"--cell {name}: {sweep.path} has no such cell (the file, or a recipe of it, was "
            f"changed); submit it again"
        )
    prepare(cell)
    print("\n".join(arguments(cell)))
