"""The verb `megacode export`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode export runs/crystal-tiny exported              # the latest checkpoint, in the family that fits
  megacode export runs/crystal-7b/checkpoints/step_00294108 crystal --format crystalcoder --dtype bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--format", metavar="FAMILY", help="llama, mistral, qwen2 ... (default: the first that fits)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: as trained)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest file (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")


def run(args: argparse.Namespace) -> int:
    from megacode.convert.export import DTYPES, Source, chosen_family, export, stored_dtype, total_bytes
    from megacode.convert.progress import byte_bar
    from megacode.data.preprocess.command import parse_size

    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output}: already there; choose another folder or give --overwrite")
    source = Source.open(args.checkpoint)
    family = chosen_family(source, args.format)
    dtype = DTYPES[args.dtype] if args.dtype else stored_dtype(source)
    shard = parse_size(args.shard_size, "--shard-size")
    with byte_bar(f"{source.checkpoint.name} -> {family.name}", total_bytes(source, family, dtype)) as on_bytes:
        if args.output.exists():
            shutil.rmtree(args.output)
        export(source, args.output, family, dtype, shard, on_bytes)
    print(f"{args.output}: {family.architecture}, {str(dtype).removeprefix('torch.')}, step {source.info['step']:,}")
    return 0
