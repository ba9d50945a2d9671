"""A 7B checkpoint to a Hugging Face folder: gigabytes a second and peak memory, beside `cp` of the same bytes.

    python bench/export.py [--recipe recipes/crystal-7b.yaml] [--folder DIR] [--rounds 2] [--table FILE.md]

A checkpoint of the recipe's model in bf16 is made (made-up weights), then `cp` of its files and `megacode export` take turns,
each in a fresh process and each followed by `sync`. DIR needs room for three copies of the weights. Memory is the largest
resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
import torch
from megatron_data import machine_line
from rich.console import Console
from rich.progress import Progress

console = Console(highlight=False, soft_wrap=True)


def make_checkpoint(recipe_path: Path, folder: Path) -> int:
    """A checkpoint as `megacode train` leaves it, without the optimizer's state. Its bytes."""
    from megacode.convert.checkpoint_writer import CheckpointWriter
    from megacode.convert.families import choose
    from megacode.convert.layout import padded, shape
    from megacode.recipe.load import dump_recipe, load_recipe

    recipe = load_recipe(recipe_path)
    model, vocab_size = recipe.model, recipe.model.vocab_size or 32_000
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, model.layers)
    slots = list(choose(model).slots(model))
    pattern = torch.randn(1 << 24).mul_(0.02).bfloat16()
    with Progress(console=console, transient=True) as bar:
        for slot in bar.track(slots, description="making the checkpoint"):
            size = shape(model, vocab_size, slot.key, model.context_length or 2048)
            count = torch.Size(size).numel()
            values = pattern.repeat(-(-count // len(pattern)))[:count].reshape(size)
            writer.add(slot.key, slot.layer, padded(model, slot.key, values))
    writer.finish()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "megacode.json").write_text(
        json.dumps({"step": 1, "vocab_size": vocab_size, "recipe": recipe.name})
    )
    os.sync()
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds until the bytes are on the disk, and the largest resident set in GB."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    os.sync()
    return time.perf_counter() - started, peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "crystal-7b.yaml"
    )
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-export-", dir=args.folder))
    try:
        size = make_checkpoint(args.recipe, work / "checkpoint")
        sides: dict[str, list[tuple[float, float]]] = {"cp": [], "megacode export": []}
        commands = {
            "cp": ["cp", "-r", str(work / "checkpoint"), str(work / "out")],
            "megacode export": [
                sys.executable,
                "-m",
                "megacode.cli",
                "export",
                str(work / "checkpoint"),
                str(work / "out"),
                "--no-tokenizer",
            ],
        }
        for _ in range(args.rounds):
            for side, command in commands.items():
                sides[side].append(timed(command))
                shutil.rmtree(work / "out")
                os.sync()
                seconds, peak = sides[side][-1]
                console.print(
                    f"{side}: {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s, {peak:.2f} GB resident"
                )
        rates = {
            side: size / 1e9 / statistics.median(s for s, _ in runs) for side, runs in sides.items()
        }
        lines = ["| side | GB/s | largest resident set | of cp's rate |", "|---|---:|---:|---:|"]
        for side, runs in sides.items():
            lines.append(
                f"| {side} | {rates[side]:.2f} | {max(p for _, p in runs):.2f} GB | {rates[side] / rates['cp']:.2f} |"
            )
        lines += [
            "",
            f"{args.recipe.name}: {size / 1e9:.1f} GB of bf16 weights, {args.rounds} rounds, median.",
        ]
        lines += [f"{date.today()}, {machine_line()}", f"    {' '.join(sys.argv)}"]
        text = "\n".join(lines)
        console.print(text, markup=False)
        if args.table:
            args.table.write_text(f"# A checkpoint to Hugging Face: `bench/export.py`\n\n{text}\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
