"""The verb `train`: plan the recipe, then train in this process or start the processes that do."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.cli.arguments import add_overrides
from megacode.errors import UserError
from megacode.launch import STOPPED, Rendezvous, launch
from megacode.signals import blocked, discard_pending

if TYPE_CHECKING:
    from megacode.plan.plan import Plan
    from megacode.train.profile import ProfileSteps

EXAMPLE = """examples:
  megacode train recipes/crystal-tiny.yaml --processes 2
  torchrun --nproc-per-node 2 -m -- megacode.cli train recipes/crystal-tiny.yaml --run runs/tiny
  srun --ntasks 2 megacode train recipes/crystal-tiny.yaml --set parallel.tensor=2 --run runs/tiny

Run again with the same --run, it goes on from the latest checkpoint, in any parallel layout.
Exit codes: 0 all is done; 75 stopped by a signal (SIGTERM, SIGINT, SIGUSR1) and saved, run again to
go on; 2 a mistake that the message names. docs/slurm.md has the way from one job to the next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", help="recipe file (YAML)")
    add_overrides(parser)
    add("--run", type=Path, help="run folder (runs/NAME of the recipe)")
    add("--restart", action="store_true", help="start over; an earlier run there is put aside")
    add("--until-phase", metavar="NAME", help="end with that phase; if it is past, exit with 0")
    record = "go on although this key differs from the run's; the run's record says so"
    add("--accept-change", action="append", default=[], metavar="KEY", help=record)
    add("--processes", type=int, help="start this many here, without torchrun; of each srun task")
    add("--profile", metavar="FIRST:LAST", help="profile these steps (from 1) into RUN/profile")
    add("--profile-ranks", default="0", metavar="RANKS", help="which ranks: 0,3 or all")
    add("--logs", type=Path, metavar="FOLDER", help="output of ranks above 0: FOLDER/rank-N.log")


def run(args: argparse.Namespace) -> int:
    # SIGUSR1 (save and stop) is held back until the first step handles it. It is blocked before
    # any thread starts: threads inherit the mask, and one without it would end the process.
    # So this module imports nothing that imports numpy, whose algebra has threads.
    with blocked([signal.SIGUSR1]):
        try:
            return _run(args)
        except UserError as error:
            _tell(args.logs, error, _rank(args.processes))
            return 2
        finally:
            discard_pending([signal.SIGUSR1])


def _tell(logs: Path | None, error: UserError, rank: int | None) -> None:
    """Print a mistake, and write it to `LOGS/mistake`; `LOGS/told`: it is in the job's own log.

    A job script sees only the largest exit code of its ranks. A rank that fails before rank 0 does
    ends the step, and rank 0 with it before that one can print anything.
    """
    text = f"megacode train: {f'rank {rank}: ' if rank else ''}{error}\n"
    print(text, end="", file=sys.stderr, flush=True)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "mistake").write_text(text)
        if not rank:
            (logs / "told").touch()


def _run(args: argparse.Namespace) -> int:
    from megacode.data.planning import plan_with_data
    from megacode.recipe.checks import check_files, check_layout
    from megacode.recipe.load import load_recipe
    from megacode.run.history import nothing_to_do
    from megacode.train.profile import ProfileSteps

    profile = ProfileSteps.parse(args.profile, args.profile_ranks) if args.profile else None
    rank = _rank(args.processes)
    if args.logs and rank:
        _redirect_output(args.logs / f"rank-{rank}.log")
    path = Path(args.recipe)
    recipe = load_recipe(path, args.overrides)
    args.run = args.run or Path("runs") / recipe.name
    check_files(recipe, path)
    plan = plan_with_data(recipe, path)
    end_step = plan.phase_end(args.until_phase)
    # A job that Slurm starts again goes on with what its first start began.
    args.restart = args.restart and not int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if not args.restart and (
        line := nothing_to_do(args.run, plan, args.until_phase, args.accept_change)
    ):
        if not rank:
            print(line, flush=True)
        return 0
    if rank is None and args.processes:
        among = _rendezvous()
        processes = args.processes * (among.launchers if among else 1)
        check_layout(recipe, processes, path)
        if profile:
            profile.check(0, end_step, processes)
        return launch(_arguments(args), args.processes, among=among)
    return _train(args, plan, end_step, profile)


def _rank(processes: int | None) -> int | None:
    """This process's rank, from its launcher; None without a launcher, and for a launcher."""
    if "RANK" in os.environ:  # what is wrong with it `read_launch` says
        return int(os.environ["RANK"]) if os.environ["RANK"].isdigit() else 0
    if "SLURM_STEP_ID" in os.environ and (processes or 1) == 1:
        return int(os.environ.get("SLURM_PROCID") or 0)
    return None


def _redirect_output(path: Path) -> None:
    """Append the output of this process and its children to a file, from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _rendezvous() -> Rendezvous | None:
    """Where the launchers of a Slurm step meet, one task a node; None outside of one."""
    if "SLURM_STEP_ID" not in os.environ:
        return None
    from megacode.megatron.distributed import reachable, read_launch

    task = read_launch()
    return Rendezvous(reachable(task, os.environ), task.port, task.rank, task.world_size)


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line of each process that this one launches."""
    line = ["train", args.recipe, "--run", str(args.run), *["--restart"] * args.restart]
    options = {"--set": args.overrides, "--accept-change": args.accept_change}
    options |= {"--until-phase": [args.until_phase], "--logs": [args.logs]}
    if args.profile:
        options |= {"--profile": [args.profile], "--profile-ranks": [args.profile_ranks]}
    for option, values in options.items():
        for value in values:
            line += [option, str(value)] if value else []
    return line


def _train(
    args: argparse.Namespace, plan: Plan, end_step: int, profile: ProfileSteps | None
) -> int:
    from megacode.megatron import cpu

    cpu.prepare()
    from megacode.megatron.distributed import read_launch
    from megacode.recipe.checks import check_layout
    from megacode.train.trainer import Trainer

    process = read_launch()
    check_layout(plan.recipe, process.world_size)
    if profile:
        profile.check(0, end_step, process.world_size)
    accept = args.accept_change
    try:
        with Trainer(plan, args.run, restart=args.restart, accept_changes=accept) as trainer:
            stopped_by = trainer.train(end_step, profile)
    except UserError as error:
        # Other ranks may wait in a collective for this one, so it leaves without a shutdown.
        # Rank 0 leaves first: its exit ends the others, whose message is needed only without it.
        if process.rank:
            time.sleep(3)
        _tell(args.logs, error, process.rank)
        os._exit(2)
    if not stopped_by or process.rank:
        return 0  # one rank is enough to report a stop
    if "SLURM_STEP_ID" in os.environ:
        time.sleep(3)  # srun ends the other tasks as soon as one leaves with a code other than 0
    return STOPPED
