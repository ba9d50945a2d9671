"""The verb `train`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode train recipes/crystal-tiny.yaml --processes 2
  torchrun --nproc-per-node 8 -m megacode.cli train recipes/crystal-7b.yaml --run runs/crystal
  srun megacode train recipes/crystal-7b.yaml --set parallel.tensor=2 --run runs/crystal

Run again with the same --run, it goes on from the latest checkpoint, in whatever parallel layout you give it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. --set parallel.tensor=2",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="run folder (default: runs/NAME of the recipe)")
    parser.add_argument("--restart", action="store_true", help="start over: an earlier run in the folder is put aside")
    parser.add_argument("--processes", type=int, help="start this many processes here (without torchrun or srun)")


def run(args: argparse.Namespace) -> int:
    from megacode.data.planning import plan_with_data
    from megacode.recipe.checks import check_files, check_layout
    from megacode.recipe.load import load_recipe

    launched = "RANK" in os.environ or "SLURM_STEP_ID" in os.environ
    recipe = load_recipe(args.recipe, args.overrides)
    folder = args.run or Path("runs") / recipe.name
    check_files(recipe, Path(args.recipe))
    plan = plan_with_data(recipe, Path(args.recipe))
    if args.processes and not launched:
        from megacode.runtime.launch import launch

        check_layout(recipe, args.processes, Path(args.recipe))
        if args.restart:
            _put_aside(folder)
        arguments = ["train", str(args.recipe), "--run", str(folder)]
        for override in args.overrides:
            arguments += ["--set", override]
        return launch(arguments, args.processes)

    return _train(plan, folder, args.restart)


def _put_aside(folder: Path) -> None:
    from megacode.train.run_folder import start_over

    aside = start_over(folder)
    if aside:
        print(f"starting over; the earlier run is kept as {aside}")


def _train(plan, folder: Path, restart: bool) -> int:  # type: ignore[no-untyped-def]  # Plan, imported lazily
    import torch

    from megacode.runtime import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megacode.recipe.checks import check_layout
    from megacode.runtime.distributed import initialize, read_launch, shutdown

    recipe = plan.recipe
    place = read_launch()
    check_layout(recipe, place.world_size)
    world = initialize(recipe.parallel, recipe.seed, place)
    try:
        from megacode.data.packing_losses import packing_line, packing_losses
        from megacode.data.tokenizer import load_tokenizer
        from megacode.train.loop import train

        if restart:
            if world.is_main:
                _put_aside(folder)
            torch.distributed.barrier()
        tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
        if world.is_main:
            print(packing_line(packing_losses(plan)), flush=True)
        return train(plan, folder, world, tokenizer, vocab_size(recipe, tokenizer))
    except UserError as error:
        # Peers may wait in a collective for this rank, so it leaves without the usual goodbyes.
        # The main rank's exit ends the others while they wait; a mistake that only they see is told by them.
        if not world.is_main:
            time.sleep(3)
        place_of = "" if world.is_main else f"rank {world.rank}: "
        print(f"megacode train: {place_of}{error}", file=sys.stderr, flush=True)
        os._exit(2)
    finally:
        if not sys.exc_info()[0]:
            shutdown()


def vocab_size(recipe, tokenizer) -> int:  # type: ignore[no-untyped-def]
    """The tokenizer's vocabulary, which a stated `model.vocab_size` must equal; or the stated one without a tokenizer.

    Raises:
        UserError: they differ, or neither is there.
    """
    stated = recipe.model.vocab_size
    if tokenizer is None:
        if stated is None:
            raise UserError("tokenizer: the recipe names none and model.vocab_size is not given; give one of the two")
        return stated
    if stated is not None and stated != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: is {stated}, and the tokenizer {recipe.tokenizer.path} has {tokenizer.vocab_size}; remove the "
            "key or give that number"
        )
    return tokenizer.vocab_size
