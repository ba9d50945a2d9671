"""The main job from nothing: corpora of this Python installation, a tokenizer, a trained model,
samples of its text, a page of plots.

`tools/quickstart` runs this (`python -m megacode.quickstart`) after it has made the environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from megacode.errors import UserError
from megacode.files import write_text

DATA = Path("data/quickstart")
PROMPTS = ("def read_lines(path):\n    ", "The statement is executed when")


def main() -> int:
    try:
        run(_parser().parse_args())
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/quickstart",
        description="Train a small code-and-text model from what this Python installation carries.",
        epilog="Run it again: it goes on with the run in the folder, or says that it is finished.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    recipe = "recipes/crystal-tiny.yaml"
    add("--recipe", default=recipe, help=f"recipe to train {default}")
    add("--processes", type=int, default=2, help=f"processes on this machine {default}")
    add("--tp", type=int, help="tensor parallel (default: 2, or what the processes allow)")
    add("--pp", type=int, default=1, help=f"pipeline parallel {default}")
    add("--run", type=Path, help="run folder (default: runs/NAME of the recipe)")
    restart = "start over; an earlier run is put aside, not deleted"
    add("--restart", action="store_true", help=restart)
    key = "change a key of the recipe"
    add("--set", action="append", dest="overrides", default=[], metavar="KEY=VALUE", help=key)
    return parser


def run(args: argparse.Namespace) -> None:
    """Prepare, train, write samples, report; what was done before is kept.

    Raises:
        UserError: the recipe or the numbers of processes are wrong.
    """
    from megacode.quickstart.corpora import prepare
    from megacode.recipe.load import load_recipe

    console = Console(highlight=False)
    started = time.monotonic()
    _check_processes(args.processes, 1 if args.tp is None else args.tp, args.pp)
    tensor = args.tp or (2 if args.processes % (2 * args.pp) == 0 else 1)
    changes = [*args.overrides, f"parallel.tensor={tensor}", f"parallel.pipeline={args.pp}"]
    recipe = load_recipe(args.recipe, changes)
    folder = args.run or Path("runs") / recipe.name

    console.rule("1  Corpora and tokenizer")
    prepare(DATA, console)
    console.rule("2  Training")
    options = ["--processes", str(args.processes), *(["--restart"] if args.restart else [])]
    options += [part for change in changes for part in ("--set", change)]
    _megacode("train", args.recipe, "--run", str(folder), *options)
    console.rule("3  What it writes")
    sampling = ["--tokens", "60", "--temperature", "0.7", "--top-p", "0.9"]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    written = _megacode("generate", str(folder), *sampling, *prompts, capture=True)
    console.print(written, markup=False, style="cyan")
    write_text(folder / "samples.txt", written)
    console.rule("4  Report")
    _megacode("report", str(folder))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    page = folder / "report.html"
    next_step = f"Next: open {page}, or change the recipe."
    console.print(f"All in {minutes} min {seconds} s. {next_step}", soft_wrap=True)


def _check_processes(processes: int, tensor: int, pipeline: int) -> None:
    if min(processes, tensor, pipeline) < 1:
        raise UserError("--processes, --tp and --pp: expected numbers of at least 1")
    if processes % (tensor * pipeline):
        raise UserError(
            f"--processes: {processes} is no multiple of --tp {tensor} x --pp {pipeline}; "
            f"give --processes {tensor * pipeline}"
        )


def _megacode(*arguments: str, capture: bool = False) -> str:
    """Run one verb in its own process; exit with its exit code if it fails.

    Returns its output where `capture` is set, else "".
    """
    command = [sys.executable, "-m", "megacode.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
