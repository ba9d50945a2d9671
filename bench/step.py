"""The whole training loop against a bare Megatron-Core loop: same model, same batches, same machine, one run.

    python bench/step.py [--recipe recipes/crystal-tiny.yaml] [--steps 40] [--rounds 3] [--set KEY=VALUE]

The bare side, bench/bare.py, is written against Megatron-Core alone. The other side is `megacode train` as a user runs it:
reading and shuffling data, losses by source, metrics.jsonl, TensorBoard. Sides take turns, each in a fresh process; what counts
is the median time of a step. muP is off, because Megatron-Core alone does not know it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from bare import bare, settings_of

WARM_UP = 5
"""Steps that do not count."""


def ours(recipe: str, changes: list[str], run: Path) -> list[float]:
    """Seconds of each step of `megacode train`, from its own metrics."""
    options = [part for change in changes for part in ("--set", change)]
    subprocess.run(
        [sys.executable, "-m", "megacode.cli", "train", recipe, "--run", str(run), *options],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["seconds"] for r in records if r["kind"] == "train"]


def prepare(recipe_path: str, changes: list[str], folder: Path) -> None:
    """Write the batches of the recipe's first phase and what the bare side needs to know of the model."""
    from megacode.data.mixture import open_mixture
    from megacode.data.planning import token_counts
    from megacode.plan.plan import make_plan
    from megacode.recipe.load import load_recipe
    from megacode.tokenizer.tokenizer import load_tokenizer

    recipe = load_recipe(recipe_path, changes)
    plan = make_plan(recipe, token_counts(recipe))
    mixture = open_mixture(plan)
    windows = []
    for step in range(plan.phases[0].steps):
        samples = mixture.step(step)
        rows = np.empty((len(samples), plan.phases[0].sequence_length + 1), np.int64)
        for index, (stream, start) in enumerate(zip(samples.stream, samples.start, strict=True)):
            source = mixture.sources[samples.phase.streams[stream].source]
            rows[index] = source.read(np.array([start]), rows.shape[1])[0]
        windows.append(rows)
    np.savez(folder / "batches.npz", windows=np.stack(windows))
    vocab = (
        load_tokenizer(recipe.tokenizer).vocab_size if recipe.tokenizer else recipe.model.vocab_size
    )
    (folder / "model.json").write_text(json.dumps(settings_of(recipe, vocab)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="recipes/crystal-tiny.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        settings = json.loads((args.bare / "model.json").read_text())
        print(json.dumps(bare(settings, np.load(args.bare / "batches.npz")["windows"])))
        return

    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up")
    from rich.table import Table

    from megacode.recipe.load import load_recipe
    from megacode.terminal import print_table, table_console

    later = [p.name for p in load_recipe(args.recipe, args.overrides).phases[1:]]
    changes = [
        *args.overrides, f"phases.0.steps={args.steps}", *(f"phases.{name}.steps=1" for name in later),
        "phases.0.fim_rate=0", "model.mup=null", "evaluation.at_phase_end=false", "checkpoints.keep_phase_ends=false",
        "logging.every=10",
    ]  # fmt: skip
    sides: dict[str, list[float]] = {"bare Megatron-Core": [], "megacode": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args.recipe, changes, folder)
        for index in range(args.rounds):
            done = subprocess.run(
                [sys.executable, __file__, "--bare", str(folder)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            sides["bare Megatron-Core"].append(
                statistics.median(json.loads(done.stdout.splitlines()[-1])[WARM_UP:])
            )
            seconds = ours(args.recipe, changes, folder / f"run{index}")[WARM_UP : args.steps]
            sides["megacode"].append(statistics.median(seconds))
    base = statistics.median(sides["bare Megatron-Core"])
    machine = platform.processor() or platform.machine()
    table = Table(
        title=f"{args.recipe}, {args.steps} steps x {args.rounds} rounds, 1 process, {machine}"
    )
    for head in ("side", "ms/step (median of rounds)", "rounds", "ratio"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for name, values in sides.items():
        middle = statistics.median(values)
        table.add_row(
            name,
            f"{middle * 1e3:.1f}",
            " ".join(f"{v * 1e3:.1f}" for v in values),
            f"{middle / base:.3f}",
        )
    print_table(table_console(), table)


if __name__ == "__main__":
    main()
