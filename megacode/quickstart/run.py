"""The main job from nothing: corpora of this Python installation, a tokenizer, three phases, a page of plots, samples.

`tools/quickstart` runs this after it has made the environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

DATA = Path("data/quickstart")
PROMPTS = {
    "code": "def read_lines(path):\n    ",
    "text": "The statement is executed when",
}
TOKENS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        default="recipes/crystal-tiny.yaml",
        help="recipe to train (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes on this machine (default: %(default)s)"
    )
    parser.add_argument(
        "--tp", type=int, help="tensor parallel (default: 2, or what the processes allow)"
    )
    parser.add_argument(
        "--pp", type=int, default=1, help="pipeline parallel (default: %(default)s)"
    )
    parser.add_argument("--run", type=Path, help="run folder (default: runs/NAME of the recipe)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start over; an earlier run is put aside, not deleted",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe",
    )


def _megacode(*arguments: str, capture: bool = False) -> str:
    """One verb in a process of its own, as a user would call it; its exit code is ours if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "megacode.cli", *arguments],
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

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
    prepare(DATA)
    console.rule("2  Training")
    options = [part for change in changes for part in ("--set", change)]
    options += ["--restart"] if args.restart else []
    _megacode(
        "train", args.recipe, "--run", str(folder), "--processes", str(args.processes), *options
    )
    console.rule("3  What it writes")
    _write_samples(folder, console)
    console.rule("4  Report")
    _megacode("report", str(folder))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(
        f"All in {minutes} min {seconds} s. Next: open {folder / 'report.html'}, or change the recipe.",
        soft_wrap=True,
    )
    return 0


def _check_processes(processes: int, tensor: int, pipeline: int) -> None:
    if processes < 1 or tensor < 1 or pipeline < 1:
        raise UserError("--processes, --tp and --pp: expected numbers of at least 1")
    if processes % (tensor * pipeline):
        raise UserError(
            f"--processes: {processes} is no multiple of --tp {tensor} x --pp {pipeline}; give --processes {tensor * pipeline}"
        )


def _write_samples(folder: Path, console: Console) -> None:
    """Continue one prompt of code and one of prose, on the screen and in RUN/samples.txt."""
    from megacode.files import write_text

    prompts = [part for text in PROMPTS.values() for part in ("--prompt", text)]
    sampling = ("--tokens", str(TOKENS), "--temperature", "0.7", "--top-p", "0.9")
    written = _megacode("generate", str(folder), *sampling, *prompts, capture=True)
    console.print(written, markup=False, style="cyan")
    write_text(folder / "samples.txt", written)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/quickstart", description="Train a small code-and-text model from what this Python installation carries.",
        epilog="Run it again: it goes on with the run in the folder (or says that it is finished); --restart starts over.",
    )  # fmt: skip
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
