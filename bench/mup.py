"""Does muP hold here? Scales of activations over widths, and the best learning rate over widths, with muP and without.

    python bench/mup.py coordinates [--widths 64 128 256 512 1024] [--steps 10] [--output docs/results]
    python bench/mup.py sweep       [--widths 64 128 256 512] [--steps 80] [--output docs/results]

Both train recipes/crystal-tiny.yaml's model (two layers, heads of 32, no other change but the width) on its corpora, which
tools/quickstart makes: half code, half text, the same batches for every width, rate and side. "muP" is Crystal's
parametrisation from a base width of 64 (its 0.073 at width 256 is 0.146 there); "standard" is Megatron-Core's usual one:
init 0.02, scores over sqrt(d), one rate for all.

`coordinates` prints the root mean square of activations before each of the first steps, and how it grows with the width
(slope of its logarithm: 0 is flat). `sweep` prints the mean loss of the last ten steps for every width and rate, and the best
rate of each width. Both write a table (.md) and a picture (.png). What a sweep has done is kept beside them in a .jsonl, and
the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from megatron_data import machine_line
from rich.console import Console
from rich.progress import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "crystal-tiny.yaml"
STANDARD = [
    "model.mup=null", "model.init_std=0.02", "model.embedding_init_std=null", "model.init_distribution=normal",
]  # fmt: skip
MUP = [
    "model.mup={base_hidden_size: 64, embedding_scale: 14.6, output_alpha: 1.0}",
    "model.init_std=0.146",
]
SIDES = {"muP": MUP, "standard": STANDARD}
RATES = {
    "muP": [2.0**-k for k in range(10, 4, -1)],
    "standard": [2.0**-k for k in range(12, 4, -1)],
}
console = Console(highlight=False)


def settings(width: int, side: str, rate: float, steps: int) -> list[str]:
    """The recipe's changes for one run."""
    return [
        *SIDES[side], f"model.hidden_size={width}", f"model.heads={width // 32}", f"model.ffn_size={width * 8 // 3}",
        "model.layers=2", "phases.phase2=null", "phases.phase3=null", f"phases.phase1.steps={steps}",
        "phases.phase1.sequence_length=128", "phases.phase1.mixture.domains={text: 0.5, code: 0.5}",
        f"phases.phase1.learning_rate={{schedule: linear, warmup: {steps // 10}, peak: {rate}, final: {rate / 10}}}",
        "parallel.micro_batch_size=8", "parallel.distributed_optimizer=false", "data.prefetch=0",
    ]  # fmt: skip


def train(
    width: int, side: str, rate: float, steps: int, look: Callable[[Any], None] | None = None
) -> Iterator[float]:
    """Loss of each step. `look` sees the model once, before the first."""
    from megacode.data.loader import StepReader
    from megacode.data.mixture import open_mixture
    from megacode.data.planning import plan_with_data
    from megacode.megatron.config import megatron_config
    from megacode.megatron.distributed import current_world
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.step import prepare_model_for_training, train_step
    from megacode.recipe.load import load_recipe
    from megacode.tokenizer.tokenizer import load_tokenizer

    recipe = load_recipe(RECIPE, settings(width, side, rate, steps))
    plan, world = plan_with_data(recipe), current_world()
    tokenizer = load_tokenizer(recipe.tokenizer)
    reader = StepReader(open_mixture(plan), tokenizer=tokenizer)
    config = megatron_config(recipe)
    chunks = wrap_data_parallel(config, build_model(recipe, tokenizer.vocab_size, config))
    optimizer = build_optimizer(recipe, chunks)
    prepare_model_for_training(chunks, optimizer)
    if look:
        look(chunks[0].module)
    for step in range(steps):
        set_lr(optimizer, plan.learning_rate(step), recipe.optimizer.weight_decay)
        batch = reader.read(step)
        sums, _ = train_step(
            chunks, optimizer, batch.micro_batches, len(plan.phases[0].streams), recipe, world
        )
        yield float(sums[0].sum() / sums[1].sum())


def one_process() -> None:
    from megacode.launch import free_port
    from megacode.megatron.distributed import Launch, initialize
    from megacode.recipe.schema import Parallel

    initialize(Parallel(), 1234, Launch(0, 1, 0, "127.0.0.1", free_port(), "bench"))


# ------------------------------------------------------------------------------------------------------- coordinates

RATE = 0.004
"""Of the coordinate check, without warm-up."""
PLACES = {"embedding": "embedding", "attention": "decoder.layers.1.self_attention", "feed-forward": "decoder.layers.1.mlp",
          "last norm's input": "decoder.layers.1", "logits": "output_layer"}  # fmt: skip


def coordinates(widths: Sequence[int], steps: int) -> dict[tuple[str, str], np.ndarray]:
    """(side, place) -> root mean square, float64 [widths, steps]."""
    seen: dict[tuple[str, str], list[list[float]]] = {
        (side, place): [] for side in SIDES for place in PLACES
    }
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("coordinates", total=len(SIDES) * len(widths) * steps)
        for side in SIDES:
            for width in widths:
                rows: dict[str, list[float]] = defaultdict(list)

                def look(model: Any, rows: dict[str, list[float]] = rows) -> None:
                    modules = dict(model.named_modules())
                    for place, name in PLACES.items():

                        def note(module: Any, args: Any, output: Any, place: str = place) -> None:
                            tensor = output[0] if isinstance(output, tuple) else output
                            if place == "logits":  # without the padding, which is masked
                                tensor = tensor[..., :1000]
                            rows[place].append(
                                float(tensor.detach().float().square().mean().sqrt())
                            )

                        modules[name].register_forward_hook(note)

                for _ in train(width, side, RATE, steps, look):
                    bar.advance(task)
                for place in PLACES:
                    seen[side, place].append(rows[place][:steps])
    return {key: np.array(value) for key, value in seen.items()}


def report_coordinates(args: argparse.Namespace) -> None:
    found = coordinates(args.widths, args.steps)
    lines = [
        "# muP: scales of activations over widths", "",
        f"Root mean square before step {args.steps} (so after {args.steps - 1} updates at rate {RATE}), and its growth with the "
        "width: slope of log RMS over log width, at the start and then.", "",
        "| side | activation | " + " | ".join(str(w) for w in args.widths) + " | slope at start | slope |",
        "|---|---|" + "---:|" * (len(args.widths) + 2),
    ]  # fmt: skip
    for (side, place), values in found.items():
        slopes = [np.polyfit(np.log(args.widths), np.log(values[:, s]), 1)[0] for s in (0, -1)]
        numbers = " | ".join(f"{v:.3g}" for v in values[:, -1])
        lines.append(f"| {side} | {place} | {numbers} | {slopes[0]:+.2f} | {slopes[1]:+.2f} |")
    write(args, "mup-coordinates", lines)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, len(PLACES), sharex=True, sharey="col")
    for row, side in enumerate(SIDES):
        for column, place in enumerate(PLACES):
            ax = axes[row, column]
            for step in range(args.steps):
                shade = 0.25 + 0.75 * step / max(args.steps - 1, 1)
                ax.plot(args.widths, found[side, place][:, step], marker="o", markersize=3, color="C0" if side == "muP" else "C3",
                        alpha=shade, label=f"step {step + 1}")  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
            if row == 0:
                ax.set_title(place, fontsize=10)
            else:
                ax.set_xlabel("width")
            if column == 0:
                ax.set_ylabel(f"{side}\nRMS")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=args.steps)
    figure.savefig(args.output / "mup-coordinates.png", dpi=130)


# ------------------------------------------------------------------------------------------------------------- sweep


def report_sweep(args: argparse.Namespace) -> None:
    record = args.output / "mup-sweep.jsonl"
    losses: dict[tuple[str, int, float], float] = {}
    if record.exists():
        for line in record.read_text().splitlines():
            entry = json.loads(line)
            if entry["steps"] == args.steps:
                losses[entry["side"], entry["width"], entry["rate"]] = entry["loss"]
    wanted = [
        (side, width, rate) for width in args.widths for side in SIDES for rate in RATES[side]
    ]
    with Progress(console=console, transient=True) as bar:
        cost = {key: key[1] * (2000 + key[1]) for key in wanted}
        task = bar.add_task(
            "sweep", total=sum(cost.values()), completed=sum(cost[k] for k in wanted if k in losses)
        )
        for key in wanted:
            if key in losses:
                continue
            side, width, rate = key
            every = []
            for loss in train(width, side, rate, args.steps):
                every.append(loss if np.isfinite(loss) else 20.0)
                bar.update(
                    task,
                    advance=cost[key] / args.steps,
                    description=f"{side}, width {width}, rate {rate:.2g}",
                )
            losses[key] = float(np.mean(every[-10:]))
            with open(record, "a") as out:
                row = {
                    "side": side,
                    "width": width,
                    "rate": rate,
                    "steps": args.steps,
                    "loss": losses[key],
                }
                out.write(json.dumps(row) + "\n")
    lines = [
        "# muP: the best learning rate over widths",
        "",
        f"Mean loss of the last 10 of {args.steps} steps.",
        "",
    ]
    best: dict[tuple[str, int], float] = {}
    for side in SIDES:
        rates = RATES[side]
        lines += [
            f"| {side}: width | "
            + " | ".join(f"2^{np.log2(r):.0f}" for r in rates)
            + " | best rate |",
            "|---:|" + "---:|" * (len(rates) + 1),
        ]
        for width in args.widths:
            values = [losses[side, width, rate] for rate in rates]
            best[side, width] = optimum(rates, values)
            marked = [f"**{v:.3f}**" if v == min(values) else f"{v:.3f}" for v in values]
            lines.append(
                f"| {width} | " + " | ".join(marked) + f" | 2^{np.log2(best[side, width]):.2f} |"
            )
        moved = np.log2(best[side, args.widths[-1]] / best[side, args.widths[0]])
        lines += [
            "",
            f"{side}: from width {args.widths[0]} to {args.widths[-1]} the best rate moves by a factor of {2**moved:.2f}.",
            "",
        ]
    write(args, "mup-sweep", lines)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for ax, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
        for n, width in enumerate(args.widths):
            colour = f"C{n}"
            ax.plot(
                RATES[side],
                [losses[side, width, r] for r in RATES[side]],
                marker="o",
                markersize=4,
                color=colour,
                label=f"width {width}",
            )
            ax.axvline(best[side, width], color=colour, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{side}: loss after {args.steps} steps; dotted: best rate", fontsize=10)
        ax.set_xlabel("learning rate")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        low = min(losses.values())
        ax.set_ylim(low - 0.1, low + 3)
    figure.axes[0].set_ylabel("loss")
    figure.savefig(args.output / "mup-sweep.png", dpi=130)


def optimum(rates: Sequence[float], values: Sequence[float]) -> float:
    """The rate of least loss: vertex of the parabola through the least value and its neighbours, over log rate."""
    i = int(np.argmin(values))
    if not 0 < i < len(rates) - 1:
        return rates[i]
    a, b, _ = np.polyfit(np.log2(rates[i - 1 : i + 2]), values[i - 1 : i + 2], 2)
    return float(2 ** (-b / (2 * a)))


def write(args: argparse.Namespace, name: str, lines: list[str]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [
            *lines,
            "",
            f"{date.today()}, {machine_line()}",
            f"    {' '.join(sys.argv)}",
            "",
            f"![{name}]({name}.png)",
            "",
        ]
    )
    (args.output / f"{name}.md").write_text(text)
    console.print(text, markup=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["coordinates", "sweep"])
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    coordinate = args.what == "coordinates"
    args.widths = args.widths or ([64, 128, 256, 512, 1024] if coordinate else [64, 128, 256, 512])
    args.steps = args.steps or (10 if coordinate else 80)
    one_process()
    (report_coordinates if coordinate else report_sweep)(args)


if __name__ == "__main__":
    main()
