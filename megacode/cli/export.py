"""The verb `megacode export`."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.convert.export import Wanted

EXAMPLE = """examples:
  megacode export runs/crystal-tiny exported              # the latest checkpoint, in the family that fits
  megacode export runs/crystal-tiny/checkpoints/step_00000370 crystal --format crystalcoder --dtype bf16
  megacode export runs/crystal-tiny revisions --all --format crystalcoder   # revisions/phase1_checkpoint_000110 ..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument(
        "--format",
        metavar="FAMILY",
        help="llama, crystalcoder, qwen2 ... (default: the first that fits)",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: as trained)"
    )
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest file (5GB)")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output if it is an export"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every checkpoint of a run, each in a folder of OUTPUT; whole ones are kept",
    )
    parser.add_argument(
        "--name-pattern", metavar="PATTERN",
        help="names with --all, of {n}, {phase}, {step}, {total}, {model} (phase{n}_checkpoint_{step:06d})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from megacode.cli.preprocess import parse_size
    from megacode.convert.export import ExportSource, Wanted, export
    from megacode.convert.revisions import check_replaceable
    from megacode.terminal import progress_bar

    wanted = Wanted(
        args.format, args.dtype, parse_size(args.shard_size, "--shard-size"), not args.no_tokenizer
    )
    if args.all:
        return _run_all(args, wanted)
    if args.name_pattern:
        raise UserError("--name-pattern: names the folders that --all makes; give both, or neither")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output}: already there; choose another folder or give --overwrite")
    output = args.output.resolve()  # where a link leads; and `.` has a name
    check_replaceable(output)
    source = ExportSource.open(args.checkpoint)
    family, dtype = wanted.family_of(source), wanted.dtype_of(source)
    total = wanted.nbytes(source)
    with (
        progress_bar(f"{source.checkpoint.name} -> {family.name}", total) as on_bytes,
        _replaced(output),
    ):
        notes = export(source, output, wanted, on_bytes)
    print(
        f"{args.output}: {family.architecture}, {str(dtype).removeprefix('torch.')}, step {source.info['step']:,}"
    )
    for note in notes:
        print(f"note: {note}")
    return 0


@contextlib.contextmanager
def _replaced(output: Path) -> Iterator[None]:
    """What stood there goes when the new one is there, and comes back where that fails."""
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.old")
    there = output.exists()
    if there:
        try:
            output.rename(aside)
        except OSError as error:
            raise UserError(
                f"{output}: cannot be moved aside ({error.strerror}); choose another folder"
            ) from error
    try:
        yield
    except BaseException:
        if there:
            aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _run_all(args: argparse.Namespace, wanted: Wanted) -> int:
    from megacode.convert.revisions import PATTERN, Outcome, export_all

    told: set[str] = set()

    def tell(outcome: Outcome) -> None:
        print(
            f"{args.output / outcome.revision.name}: step {outcome.revision.step:,}, {outcome.state}"
        )
        for note in outcome.notes:
            if note not in told:
                print(f"note: {note}")
            told.add(note)

    export_all(
        args.checkpoint,
        args.output,
        wanted,
        args.name_pattern or PATTERN,
        args.overwrite,
        tell=tell,
    )
    return 0
