"""The verb `fork`: a new run that shares another's first steps."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megacode.cli.arguments import add_overrides, at_least
from megacode.errors import UserError
from megacode.recipe.load import load_recipe
from megacode.run.fork import fork

EXAMPLE = """examples:
  megacode fork runs/crystal-tiny --at 370 --set phases.phase3.mixture.domains.code.fim_rate=0.9
  megacode fork runs/crystal-tiny --at 300 --to runs/lower-rate \\
    --set phases.phase2.learning_rate.peak=0.001
  megacode fork runs/crystal-tiny --at 300 --cool-down 40 --to runs/cooled

The phase that holds the step is split there; --set changes keys from that step on. What is changed
of its mixture, learning rate or batch size begins anew at the split (a schedule with its first
step, warm-up included); what is not changed goes on where it stood. A longer run needs no fork:
lengthen the recipe and train on in the same folder.

With --cool-down the run ends N steps later: the rate goes linearly to zero from where it stands at
the step, and all else goes on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--at", type=int, required=True, metavar="STEP", help="finished steps that both runs share")
    add("--to", type=Path, metavar="NEWRUN", help="new run folder (RUN-at-STEP)")
    add("--recipe", type=Path, help="recipe of the new run (the run's own)")
    add("--cool-down", type=at_least(1), metavar="N", help="N steps to a rate of zero, no others")
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    new = args.to or args.run.with_name(f"{args.run.name}-at-{args.at}")
    if args.cool_down and (args.recipe or args.overrides):
        raise UserError(
            "--cool-down: follows the run's own recipe, without --recipe and --set; edit the new "
            "run's recipe before training it"
        )
    lines = fork(args.run, args.at, new, args.recipe, args.overrides, args.cool_down)
    print("\n".join(lines))
    recipe, folder = shlex.quote(str(new / "recipe.yaml")), shlex.quote(str(new))
    parallel = load_recipe(new / "recipe.yaml").parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    processes = f" --processes {ranks}" if ranks > 1 else ""
    print(f"train it with: megacode train {recipe} --run {folder}{processes}")
    return 0
