"""The verb `average`: the mean of a run's checkpoints as a checkpoint of weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from megacode.cli.arguments import at_least, whole_numbers
from megacode.errors import UserError
from megacode.terminal import progress_bar

EXAMPLE = """examples:
  megacode average runs/crystal-tiny --last 3
  megacode average runs/crystal-tiny --steps 370,400,470 --output averaged

The result has weights alone. `evaluate`, `generate` and `export` take its folder like any
checkpoint, and a recipe starts from it with `initialize_from`; no run resumes from it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=at_least(1), metavar="N", help="the newest N checkpoints")
    which.add_argument(
        "--steps", type=whole_numbers, metavar="LIST", help="of these steps: 100,200"
    )
    add = parser.add_argument
    kinds = "the weights, or their moving average that `optimizer.ema` keeps"
    add("--weights", choices=["raw", "ema"], default="raw", help=kinds)
    add("--output", type=Path, metavar="FOLDER", help="folder to make (RUN/averages/NAME)")


def run(args: argparse.Namespace) -> int:
    from megacode.convert.average import Average

    average = Average.open(args.run, args.last, args.steps, args.weights == "ema")
    output = args.output or average.folder
    if output.exists():
        raise UserError(f"{output}: already there; choose another --output, or remove it")
    with progress_bar(f"mean of {len(average.steps)}", average.nbytes) as on_bytes:
        notes = average.write(output, on_bytes)
    steps = ", ".join(f"{step:,}" for step in average.steps)
    what = "EMA weights" if args.weights == "ema" else "weights"
    print(f"{output}: mean of the {what} of {len(average.steps)} checkpoints, steps {steps}")
    for note in notes:
        print(f"note: {note}")
    return 0
