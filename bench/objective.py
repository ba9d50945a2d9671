"""What a phase's objective costs: steps with next-token loss alone beside steps with a loss of pairs, on the same data, in one run.

    tools/study-data ntp-plus
    python bench/objective.py [--recipe recipes/studies/ntp-plus/tiny.yaml] [--phase pairs] [--steps 25] [--rounds 3] [--set KEY=VALUE]

Sides take turns, each in a fresh process; what counts is the median time of a step. `weighted_tokens` has its pairs as sequences,
so its rows are others. Memory is the most that the process held (RSS).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 5
"""Steps that do not count."""
SEQUENCES = "sources.pairs.path=data/studies/ntp-plus/sequences/train"
SIDES = {
    "next_token": ["objective=null"],
    "contrastive": ["objective={contrastive: {weight: 0.1}}"],
    "contrastive, layer 1": ["objective={contrastive: {weight: 0.1, layer: 1}}"],
    "weighted_tokens": ["objective={contrastive: null, weighted_tokens: {weight: 1.0}}", SEQUENCES],
}


def train(recipe: str, changes: list[str], run: Path) -> tuple[list[float], float]:
    """Seconds of each step of `megacode train`, and the most memory that it held, in GB."""
    options = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "megacode.cli", "train", recipe, "--run", str(run), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["seconds"] for r in records if r["kind"] == "train"], usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="recipes/studies/ntp-plus/tiny.yaml")
    parser.add_argument("--phase", default="pairs")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up")
    from rich.table import Table

    from megacode.recipe.load import load_recipe
    from megacode.terminal import print_table, table_console

    names = [phase.name for phase in load_recipe(args.recipe, args.overrides).phases]
    if args.phase not in names:
        parser.error(f"--phase: {args.phase} is none of {', '.join(names)}")
    shared = [
        *args.overrides, *(f"phases.{name}=null" for name in names if name != args.phase), f"phases.{args.phase}.steps={args.steps}",
        "evaluation.at_phase_end=false", "evaluation.tasks=null", "checkpoints.keep_phase_ends=false", "logging.every=10",
    ]  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    memory: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            for name, (objective, *others) in SIDES.items():
                changes = [*shared, f"phases.{args.phase}.{objective}", *others]
                steps, most = train(args.recipe, changes, Path(folder, f"{name}-{index}"))
                seconds[name].append(statistics.median(steps[WARM_UP:]))
                memory[name].append(most)
    base = statistics.median(seconds["next_token"])
    machine = platform.processor() or platform.machine()
    table = Table(
        title=f"{args.recipe}, {args.steps} steps x {args.rounds} rounds, 1 process, {machine}"
    )
    for head in ("objective", "ms/step (median of rounds)", "rounds", "ratio", "memory, GB"):
        table.add_column(head, justify="left" if head == "objective" else "right")
    for name, values in seconds.items():
        middle = statistics.median(values)
        rounds = " ".join(f"{value * 1e3:.0f}" for value in values)
        held = f"{statistics.median(memory[name]):.2f}"
        table.add_row(name, f"{middle * 1e3:.1f}", rounds, f"{middle / base:.3f}", held)
    print_table(table_console(), table)


if __name__ == "__main__":
    main()
