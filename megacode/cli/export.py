"""The verb `megacode export`."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.cli.arguments import size
from megacode.errors import UserError
from megacode.terminal import progress_bar
from megacode.tokenizer.chat import BUILT_IN

if TYPE_CHECKING:
    from megacode.convert.export import Wanted

EXAMPLE = """examples:
  megacode export runs/crystal-tiny exported      # the latest checkpoint, in the family that fits
  megacode export runs/crystal-tiny/checkpoints/step_00000370 crystal --dtype bf16
  megacode export runs/crystal-tiny revisions --all --format crystalcoder
  megacode export runs/crystal-tiny chat --chat-template alpaca

--all keeps the folders of OUTPUT that are whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run, or one of its checkpoints")
    add("output", type=Path, help="folder to make")
    add("--format", metavar="FAMILY", help="llama, crystalcoder, qwen2 ... (the first that fits)")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (as trained)")
    add("--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file")
    templates = f"{', '.join(BUILT_IN)}, or a file"
    default = "that of the run's conversations, else the one beside its tokenizer"
    add("--chat-template", metavar="TEMPLATE", help=f"{templates} ({default})")
    add("--no-tokenizer", action="store_true", help="write no tokenizer files")
    add("--overwrite", action="store_true", help="replace the output if it is an export")
    add("--all", action="store_true", help="all checkpoints of a run, each in a folder of OUTPUT")
    names = "names with --all, of {n}, {phase}, {step}, {total}, {model}"
    add("--name-pattern", metavar="PATTERN", help=f"{names} (phase{{n}}_checkpoint_{{step:06d}})")


def run(args: argparse.Namespace) -> int:
    from megacode.convert.export import ExportSource, Wanted, export
    from megacode.convert.revisions import check_replaceable

    wanted = Wanted(
        args.format, args.dtype, args.shard_size, not args.no_tokenizer, args.chat_template
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
    title = f"{source.checkpoint.name} -> {family.name}"
    with progress_bar(title, wanted.nbytes(source)) as on_bytes, _replaced(output):
        notes = export(source, output, wanted, on_bytes)
    kind = f"{family.architecture}, {str(dtype).removeprefix('torch.')}"
    print(f"{args.output}: {kind}, step {source.info['step']:,}")
    for note in notes:
        print(f"note: {note}")
    return 0


@contextlib.contextmanager
def _replaced(output: Path) -> Iterator[None]:
    """Move what is at `output` aside; remove it after the block, or put it back on failure."""
    if not output.exists():
        yield
        return
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.old")
    try:
        output.rename(aside)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be moved aside ({error.strerror}); choose another folder"
        ) from error
    try:
        yield
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _run_all(args: argparse.Namespace, wanted: Wanted) -> int:
    from megacode.convert.revisions import PATTERN, export_all

    told: set[str] = set()
    pattern = args.name_pattern or PATTERN
    for done in export_all(args.checkpoint, args.output, wanted, pattern, args.overwrite):
        print(f"{args.output / done.name}: step {done.step:,}, {done.state}")
        for note in done.notes:
            if note not in told:
                print(f"note: {note}")
            told.add(note)
    return 0
