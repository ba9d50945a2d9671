"""The verb `fork`: a new run that shares another's first steps."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megacode.recipe.load import load_recipe
from megacode.run.fork import fork

EXAMPLE = """examples:
  megacode fork runs/crystal-tiny --at 370 --set phases.phase3.mixture.domains.code.fim_rate=0.9
  megacode fork runs/crystal-tiny --at 300 --set phases.phase2.learning_rate.peak=0.001 --to runs/lower-rate

The phase that holds the step is split there. What is changed of its mixture, learning rate or batch size begins anew at
the split (a schedule with its first step, warm-up included); what is not changed goes on where it stood. A longer run needs
no fork: lengthen the recipe and train on in the same folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--at", type=int, required=True, metavar="STEP", help="finished steps that both runs share"
    )
    parser.add_argument(
        "--to", type=Path, metavar="NEWRUN", help="new run folder (default: RUN-at-STEP)"
    )
    parser.add_argument(
        "--recipe", type=Path, help="recipe of the new run (default: the run's own)"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the recipe from that step on, e.g. --set phases.phase2.fim_rate=0.5",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    new = args.to or args.run.with_name(f"{args.run.name}-at-{args.at}")
    lines = fork(args.run, args.at, new, args.recipe, args.overrides)
    print("\n".join(lines))
    recipe, folder = shlex.quote(str(new / "recipe.yaml")), shlex.quote(str(new))
    parallel = load_recipe(new / "recipe.yaml").parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    processes = f" --processes {ranks}" if ranks > 1 else ""
    print(f"train it with: megacode train {recipe} --run {folder}{processes}")
    return 0
