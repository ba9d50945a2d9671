"""`megacode plan`: the whole run as tables before it starts. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.cli.arguments import add_overrides, at_least, fraction
from megacode.errors import UserError
from megacode.files import write_text
from megacode.plan.devices import DEVICES
from megacode.plan.trajectory import fixed, fixed_blocks, recorded
from megacode.recipe.checks import check_layout
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.schema import Recipe
from megacode.terminal import print_table, table_console

if TYPE_CHECKING:
    from megacode.report.plan_costs import Machine

EXAMPLE = """examples:
  megacode plan recipes/crystal-7b.yaml --gpus 64 --device h100 --mfu 0.45 --price 2.5
  megacode plan recipes/crystal-7b.yaml --gpus 64 --suggest
  megacode plan recipes/crystal-7b.yaml --plot plan.png --checkpoints
  megacode plan recipes/crystal-tiny.yaml my-recipe.yaml --compare
  megacode plan runs/crystal-tiny                     # a run's folder: as it was started"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", type=Path, help="recipe file, a run's folder, or a sweep's file")
    add("other", type=Path, nargs="?", help="second recipe, for --compare")
    add_overrides(parser)
    add("--gpus", type=at_least(1), metavar="N", help="devices, for memory and time")
    add("--mfu", type=fraction, default=0.45, help="share of the device's peak")
    devices = "a100, h100, b200 ..."
    add("--device", choices=sorted(DEVICES), default="h100", metavar="NAME", help=devices)
    add("--plot", type=Path, metavar="FILE", help="also draw shares, rate, batch size (.png, .svg)")
    add("--price", type=at_least(0, float), metavar="X", help="of a device hour; tells the run's")
    add("--checkpoints", action="store_true", help="list every checkpoint")
    add("--suggest", action="store_true", help="propose parallel layouts for --gpus, fastest first")
    add("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="joined by NVLink")
    compare = "print what both recipes read of each source, and where totals or orders differ"
    add("--compare", action="store_true", help=f"{compare}; --set changes both")
    fix = "also write the recipe with the shares that the run has recorded (mixture.online)"
    add("--fixed-mixture", type=Path, metavar="FILE", help=fix)
    add("--json", action="store_true", help="print the plan as JSON instead")


def run(args: argparse.Namespace) -> int:
    from megacode.data.packing_report import packing_losses
    from megacode.data.planning import plan_with_data
    from megacode.data.tokenizer_check import unknown_makers
    from megacode.plan.summary import plan_as_dict, vocabulary
    from megacode.report.plan_costs import Machine, print_costs
    from megacode.report.plan_tables import packing_table, print_plan
    from megacode.studies.sweep import is_sweep

    if args.compare or args.other:
        return _compare(args)
    if is_sweep(args.recipe):
        return _sweep(args)
    recipe = _load(args.recipe, args.overrides)
    if args.fixed_mixture:
        recipe = fixed(recipe)
        write_text(args.fixed_mixture, dump_recipe(recipe))
    vocab_size = vocabulary(recipe)
    machine = Machine(args.gpus, args.device, args.mfu, args.price)
    if args.suggest:
        return _suggest(recipe, vocab_size, machine, args)
    if args.gpus:
        check_layout(recipe, args.gpus, args.recipe)
    plan = plan_with_data(recipe, args.recipe)
    if args.plot:
        from megacode.report.plan_plot import plot_plan  # matplotlib

        plot_plan(plan, args.plot)
    losses = packing_losses(plan)
    if args.json:
        packing = [dataclasses.asdict(one) for one in losses]
        print(json.dumps({**plan_as_dict(plan, vocab_size), "packing": packing}, indent=1))
        return 0
    console = table_console()
    print_plan(plan, vocab_size, console, args.checkpoints)
    print_costs(plan, vocab_size, machine, console)
    if table := packing_table(plan, losses):
        print_table(console, table)
    if note := unknown_makers(recipe):
        console.print(note)
    if args.plot:
        console.print(f"drawn: {args.plot}")
    if args.fixed_mixture:
        console.print(f"written: {args.fixed_mixture}{''.join(fixed_blocks(recipe))}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from megacode.report.plan_costs import Machine
    from megacode.studies.sweep import open_sweep
    from megacode.studies.tables import plan_rows, print_plan

    beside = {
        "set": "overrides",
        "plot": "plot",
        "checkpoints": "checkpoints",
        "suggest": "suggest",
    }
    if given := [f"--{option}" for option, name in beside.items() if getattr(args, name)]:
        raise UserError(f"{given[0]}: {args.recipe} is a sweep; plan one of its recipes for that")
    sweep, machine = open_sweep(args.recipe), Machine(args.gpus, args.device, args.mfu, args.price)
    if args.json:
        print(json.dumps(plan_rows(sweep, machine), indent=1))
    else:
        print_plan(sweep, machine, table_console())
    return 0


def _load(path: Path, overrides: list[str]) -> Recipe:
    """A recipe, or that of a run with the shares that it has recorded."""
    if path.is_dir():
        return recorded(load_recipe(path / "recipe.yaml", overrides), path)
    return load_recipe(path, overrides)


def _compare(args: argparse.Namespace) -> int:
    from megacode.data.planning import plan_with_data
    from megacode.report.plan_comparison import Comparison

    if not (args.compare and args.other):
        raise UserError("--compare: compares two recipes; give RECIPE, OTHER and --compare")
    beside = ("gpus", "plot", "price", "checkpoints", "suggest", "fixed_mixture")
    if given := [f"--{name.replace('_', '-')}" for name in beside if getattr(args, name)]:
        raise UserError(f"--compare: takes no {given[0]}; leave it out, or plan one recipe")
    files = (args.recipe, args.other)
    plans = [plan_with_data(_load(file, args.overrides), file) for file in files]
    comparison = Comparison(*plans)
    if args.json:
        print(json.dumps(comparison.as_dict(), indent=1))
    else:
        comparison.print(table_console())
    return 0


def _suggest(
    recipe: Recipe, vocab_size: int | None, machine: Machine, args: argparse.Namespace
) -> int:
    from megacode.plan.suggest import suggest
    from megacode.report.plan_costs import print_suggestions

    if not args.gpus:
        raise UserError("--suggest: give the number of devices, --gpus N")
    if vocab_size is None:
        raise UserError(
            f"{args.recipe}: model.vocab_size: --suggest needs it where the tokenizer is not there;"
            " add the key"
        )
    proposals = suggest(recipe, vocab_size, args.gpus, machine.peak, args.gpus_per_node)
    if args.json:
        rows = [
            dict(settings=p.settings(), data=p.data, memory=p.memory.total, seconds=p.seconds)
            for p in proposals
        ]
        print(json.dumps(rows, indent=1))
    else:
        print_suggestions(proposals, machine, str(args.recipe), args.overrides, table_console())
    return 0
