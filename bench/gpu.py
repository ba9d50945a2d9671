"""Training speed on one CUDA device: megacode's step against a bare Megatron-Core loop, bf16 and every FP8 recipe.

    python bench/gpu.py [--cases crystal-7b,crystal-7b-24-layers] [--precisions bf16,delayed,tensorwise,blockwise] [--steps 12]

Each measurement is a fresh process. Both sides build the same model and take the same synthetic batches; what counts is
the median step after warm-up. TFLOP/s count 6 FLOPs for every weight of a matrix product and token, plus attention with the
causal half counted in full (PaLM's convention, see megacode.recipe.estimate); MFU is against the dense bf16 peak, also for
FP8.

Writes docs/results/gpu-DEVICE.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bare import bare, settings_of

from megacode.recipe.estimate import flops_per_token
from megacode.recipe.schema import LearningRate, Mixture, Model, Parallel, Phase, Precision, Recipe

VOCAB = 32032
SHAPES: dict[str, tuple[Model, int, int, int]] = {
    # name: (model, sequence length, micro-batch size, sequences in a step)
    "crystal-7b": (
        Model(layers=32, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
              rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True, vocab_size=VOCAB), 2048, 2, 32,
    ),
    "crystal-7b-8k": (
        Model(layers=32, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
              rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True, vocab_size=VOCAB), 8192, 1, 4,
    ),
    "crystal-7b-24-layers": (
        Model(layers=24, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
              rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True, vocab_size=VOCAB), 2048, 2, 32,
    ),
    "llama-8b-16-layers": (
        Model(layers=16, hidden_size=4096, heads=32, kv_heads=8, ffn_size=14336, vocab_size=VOCAB), 8192, 1, 4,
    ),
}  # fmt: skip


def recipe_of(shape: str, precision: str) -> Recipe:
    model, length, micro, batch = SHAPES[shape]
    phase = Phase(
        name="p", steps=1, batch_size=batch, sequence_length=length, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=3e-4),
    )  # fmt: skip
    compute = Precision(compute="bf16") if precision == "bf16" else Precision(compute="fp8", fp8_recipe=precision)
    return Recipe(
        name="bench",
        model=model,
        sources={},
        phases=[phase],
        precision=compute,
        parallel=Parallel(micro_batch_size=micro),
    )


def synthetic(recipe: Recipe, steps: int) -> np.ndarray:
    phase = recipe.phases[0]
    shape = (steps, int(phase.batch_size), phase.sequence_length + 1)
    return np.random.default_rng(0).integers(0, VOCAB, shape)


def ours(recipe: Recipe, windows: np.ndarray) -> list[float]:
    """Seconds of each `train_step` as the loop calls it, batches included."""
    import torch

    from megacode.data.batch import make_batch
    from megacode.model.gpt import build_model, transformer_config
    from megacode.runtime.distributed import Launch, initialize, shutdown
    from megacode.runtime.launch import free_port
    from megacode.train.optimizer import build_optimizer, set_rates, wrap_data_parallel
    from megacode.train.step import prepare_model_for_training, train_step

    world = initialize(recipe.parallel, 1, Launch(0, 1, 0, "127.0.0.1", free_port(), "bench"))
    config = transformer_config(recipe)
    chunks = wrap_data_parallel(recipe, config, build_model(recipe, VOCAB, config), 1)
    optimizer = build_optimizer(recipe, chunks)
    prepare_model_for_training(chunks, optimizer)
    micro, seconds = recipe.parallel.micro_batch_size, []
    for window in windows:
        started = time.perf_counter()
        parts = [
            make_batch(window[i : i + micro], np.zeros(micro, np.int32), np.arange(i, i + micro))
            for i in range(0, len(window), micro)
        ]
        set_rates(optimizer, 3e-4, 0.1)
        train_step(chunks, optimizer, parts, 1, recipe, world)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    shutdown()
    return seconds


def measure(side: str, shape: str, precision: str, steps: int) -> dict[str, Any]:
    import torch

    recipe = recipe_of(shape, precision)
    windows = synthetic(recipe, steps)
    seconds = ours(recipe, windows) if side == "megacode" else bare(settings_of(recipe, VOCAB), windows)
    return {
        "seconds": seconds,
        "memory": torch.cuda.max_memory_allocated() / 2**30,
        "device": torch.cuda.get_device_name(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="crystal-7b")
    parser.add_argument("--precisions", default="bf16,delayed,tensorwise,blockwise")
    parser.add_argument("--sides", default="bare,megacode")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, help="folder for the results page (default: docs/results)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(*args.one, args.steps)))
        return
    rows = []
    for shape in args.cases.split(","):
        for precision in args.precisions.split(","):
            for side in args.sides.split(","):
                rows.append(_row(shape, precision, side, args.steps))
                print(rows[-1], flush=True)
                page = write_page(rows, args)  # after every row: a visit that ends early leaves what it measured
    print(page)


def _row(shape: str, precision: str, side: str, steps: int) -> dict[str, Any]:
    from megacode.recipe.devices import peak_flops

    done = subprocess.run(
        [sys.executable, __file__, "--one", side, shape, precision, "--steps", str(steps)],
        capture_output=True, text=True,
    )  # fmt: skip
    line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
    row: dict[str, Any] = {"shape": shape, "precision": precision, "side": side}
    if line is None:
        why = [text for text in done.stderr.splitlines() if "Error" in text]
        return {**row, "failed": (why or done.stderr.splitlines() or ["no output"])[-1][:160]}
    result = json.loads(line[len("RESULT ") :])
    model, length, _, batch = SHAPES[shape]
    seconds = statistics.median(result["seconds"][4:])
    rate = batch * length / seconds
    flops = rate * flops_per_token(model, VOCAB, length)
    peak = peak_flops(result["device"], "bf16")
    return {
        **row, "device": result["device"], "ms": seconds * 1e3, "tokens": rate, "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None, "memory": result["memory"],
    }  # fmt: skip


def write_page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write the table to docs/results/gpu-DEVICE.md."""
    import torch

    device = next((row["device"] for row in rows if "device" in row), "none")
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    try:
        import transformer_engine

        versions += f", Transformer Engine {transformer_engine.__version__}"
    except ImportError:
        versions += ", no Transformer Engine"
    import megatron.core

    versions += f", megatron-core {megatron.core.__version__}"
    bases = {(r["shape"], r["precision"]): r["ms"] for r in rows if r["side"] == "bare" and "ms" in r}
    lines = [
        f"# Training speed on one {device}", "",
        f"{time.strftime('%Y-%m-%d')}, {versions}. Command: `python bench/gpu.py --cases {args.cases} --precisions "
        f"{args.precisions} --steps {args.steps}`. {__doc__.split(chr(10) * 2)[2]}", "",
        "| model | precision | side | ms/step | tokens/s | TFLOP/s | MFU (bf16 dense peak) | peak GiB | time vs bare |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['shape']} | {r['precision']} | {r['side']} | failed: {r['failed']} | | | | | |")
            continue
        base = bases.get((r["shape"], r["precision"]))
        lines.append(
            f"| {r['shape']} | {r['precision']} | {r['side']} | {r['ms']:.0f} | {r['tokens']:,.0f} | {r['tflops']:.0f} | "
            f"{r['mfu']:.1%} | {r['memory']:.1f} | {r['ms'] / base if base else float('nan'):.3f} |"
        )
    page = "\n".join(lines) + "\n"
    folder = args.output or Path(__file__).parents[1] / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu-{device.lower().replace(' ', '-')}.md").write_text(page)
    return page


if __name__ == "__main__":
    main()
