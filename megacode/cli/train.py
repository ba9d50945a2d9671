"""The verb `train`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.errors import UserError
from megacode.launch import STOPPED, Rendezvous, launch
from megacode.run.profile_steps import ProfileSteps
from megacode.signals import blocked, discard_pending

if TYPE_CHECKING:
    from megacode.plan.plan import Plan

EXAMPLE = """examples:
  megacode train recipes/crystal-tiny.yaml --processes 2
  torchrun --nproc-per-node 2 -m -- megacode.cli train recipes/crystal-tiny.yaml --run runs/tiny
  srun --ntasks 2 megacode train recipes/crystal-tiny.yaml --set parallel.tensor=2 --run runs/tiny

Run again with the same --run, it goes on from the latest checkpoint, in whatever parallel layout you give it.
Exit codes: 0 all is done; 75 stopped by a signal (SIGTERM, SIGINT, SIGUSR1) and saved, run again to go on; 2 a mistake that
the message names. docs/slurm.md has the way from one job to the next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the recipe, e.g. --set parallel.tensor=2",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="run folder (default: runs/NAME of the recipe)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start over: an earlier run in the folder is put aside",
    )
    parser.add_argument(
        "--until-phase",
        metavar="NAME",
        help="end with that phase; if it is past, do nothing and exit with 0",
    )
    parser.add_argument(
        "--accept-change", action="append", default=[], metavar="KEY",
        help="go on although this key, of model, optimizer or past rates, was another before; the run's record says so",
    )  # fmt: skip
    parser.add_argument(
        "--processes",
        type=int,
        help="start this many processes here, without torchrun; in a task of srun: of each task",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="profile these steps (counted from 1) into RUN/profile, for Perfetto",
    )
    parser.add_argument(
        "--profile-ranks", default="0", metavar="RANKS", help="which ranks: 0,3 or all (default: 0)"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        metavar="FOLDER",
        help="what ranks other than 0 say goes to FOLDER/rank-N.log",
    )


def run(args: argparse.Namespace) -> int:
    # A request to save and stop that comes while the run starts waits for the first step: there it is heeded. Said before
    # there are threads, which inherit it; one that did not would take the signal and end the process.
    with blocked([signal.SIGUSR1]):
        try:
            return _run(args)
        except UserError as error:
            _tell(args.logs, error, _rank(args.processes))
            return 2
        finally:
            discard_pending([signal.SIGUSR1])


def _tell(logs: Path | None, error: UserError, rank: int | None) -> None:
    """Say what is wrong, and leave word for a job script, which learns of a step's largest exit code only: `LOGS/mistake`, and
    `LOGS/told` once it stands in the job's own log. A rank that sees a mistake before rank 0 does ends the step, and with it
    rank 0 before it could speak."""
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
    from megacode.run.folder import nothing_to_do

    profile = ProfileSteps.parse(args.profile, args.profile_ranks) if args.profile else None
    rank = _rank(args.processes)
    if args.logs and rank:
        _speak_into(args.logs / f"rank-{rank}.log")
    recipe = load_recipe(args.recipe, args.overrides)
    folder = args.run or Path("runs") / recipe.name
    check_files(recipe, Path(args.recipe))
    plan = plan_with_data(recipe, Path(args.recipe))
    until = plan.phase_end(args.until_phase)
    # A job that Slurm starts again goes on with what its first start began.
    restart = args.restart and not int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if not restart and (line := nothing_to_do(folder, plan, args.until_phase, args.accept_change)):
        if not rank:
            print(line, flush=True)
        return 0
    if rank is None and args.processes:
        among = _rendezvous()
        processes = args.processes * (among.launchers if among else 1)
        check_layout(recipe, processes, Path(args.recipe))
        if profile:
            profile.check(0, until, processes)
        return _launch(args, folder, among)
    return _train(plan, folder, restart, until, args.logs, profile, args.accept_change)


def _rank(processes: int | None) -> int | None:
    """This process's rank as its launcher told it; None for one that no launcher started, or that is to be a launcher."""
    if "RANK" in os.environ:
        return (
            int(os.environ["RANK"]) if os.environ["RANK"].isdigit() else 0
        )  # `read_launch` says what is wrong
    if "SLURM_STEP_ID" in os.environ and (processes or 1) == 1:
        return int(os.environ.get("SLURM_PROCID") or 0)
    return None


def _speak_into(path: Path) -> None:
    """Let everything that this process and its children say from now on go to a file."""
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


def _launch(args: argparse.Namespace, folder: Path, among: Rendezvous | None) -> int:
    arguments = ["train", str(args.recipe), "--run", str(folder)]
    for override in args.overrides:
        arguments += ["--set", override]
    for key in args.accept_change:
        arguments += ["--accept-change", key]
    arguments += ["--until-phase", args.until_phase] if args.until_phase else []
    arguments += ["--logs", str(args.logs)] if args.logs else []
    arguments += ["--restart"] if args.restart else []
    arguments += (
        ["--profile", args.profile, "--profile-ranks", args.profile_ranks] if args.profile else []
    )
    return launch(arguments, args.processes, among=among)


def _train(
    plan: Plan,
    folder: Path,
    restart: bool,
    end_step: int,
    logs: Path | None,
    profile: ProfileSteps | None,
    accept: list[str],
) -> int:
    from megacode.megatron import cpu

    cpu.prepare()
    from megacode.megatron.distributed import read_launch
    from megacode.recipe.checks import check_layout
    from megacode.train.trainer import Trainer

    launch = read_launch()
    check_layout(plan.recipe, launch.world_size)
    if profile:
        profile.check(0, end_step, launch.world_size)
    try:
        with Trainer(plan, folder, restart=restart, accept_changes=accept) as trainer:
            stopped_by = trainer.train(end_step, profile)
    except UserError as error:
        # Peers may wait in a collective for this rank, so it leaves without the usual goodbyes.
        # The main rank's exit ends the others while they wait; a mistake that only they see is told by them.
        if launch.rank:
            time.sleep(3)
        _tell(logs, error, launch.rank)
        os._exit(2)
    if not stopped_by or launch.rank:
        return 0  # of a stop one rank says it
    if "SLURM_STEP_ID" in os.environ:
        time.sleep(
            3
        )  # srun ends the other tasks as soon as one leaves with a code, so this one leaves last
    return STOPPED
