"""Training speed on one CUDA device: `megacode train` against a bare Megatron-Core loop, bf16 and every FP8 recipe.

    python bench/gpu.py [--cases crystal-7b,llama-8b-16-layers] [--precisions bf16,delayed,tensorwise-params] [--minutes 9]

Each measurement is a fresh process. `bare` is GPTModel, DistributedDataParallel, optimizer and schedule of Megatron-Core
with batches ready in memory; `megacode` is the command line on a tokenized corpus: loader, metrics and log included, from the
end of one step to the end of the next. Same model, same batch shape, same fusions; what counts is the median step after warm-up.
`-params` keeps the layers' matrices in FP8 alone, which lets the full 7B fit. `unfused` (on request) is megacode with
fusion.gradient_accumulation off.

TFLOP/s count 6 FLOPs for every weight of a matrix product and token, plus attention with the causal half counted in full
(PaLM's convention, see megacode.recipe.estimate); MFU is against the dense bf16 peak, also for FP8.

Writes docs/results/gpu-DEVICE.md after every measurement, so that a visit that ends early leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bare import bare, settings_of

from megacode.recipe.devices import peak_flops
from megacode.recipe.estimate import flops_per_token
from megacode.recipe.load import dump_recipe
from megacode.recipe.memory import memory_per_rank
from megacode.recipe.schema import (
    Checkpoints,
    Fusion,
    LearningRate,
    Logging,
    Mixture,
    Model,
    Optimizer,
    Parallel,
    Phase,
    Precision,
    Recipe,
    Recompute,
    Source,
)

VOCAB = 32032
WARM_UP = 4
PRECISIONS = ("bf16", "delayed", "tensorwise", "blockwise", "mxfp8", "delayed-params", "tensorwise-params")
SIDES = ("bare", "megacode", "unfused")


@dataclass(frozen=True)
class Case:
    model: Model
    length: int
    micro_batch: int
    batch: int
    """Sequences in a step. On one device an update of all weights weighs more than on many that share it."""
    recomputed: int = 0
    """Layers whose forward pass is repeated in the backward pass; what that costs is not counted as work done."""
    lean: bool = False
    """Both sides with Megatron-Core's precision-aware optimizer, which keeps 16 bits of the master copy: the same
    numbers, 12 GiB less for 7B."""

    def __str__(self) -> str:
        again = f", {self.recomputed} layers recomputed" if self.recomputed else ""
        again += ", precision-aware optimizer" if self.lean else ""
        return (
            f"{self.model.layers} layers, {self.batch} sequences of {self.length:,} tokens a step in micro-batches of "
            f"{self.micro_batch}{again}"
        )


def _crystal(layers: int) -> Model:
    return Model(
        layers=layers, hidden_size=4096, heads=32, ffn_size=10922, normalization="layernorm", linear_bias=True,
        rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True, vocab_size=VOCAB,
    )  # fmt: skip


def _llama(layers: int) -> Model:
    return Model(layers=layers, hidden_size=4096, heads=32, kv_heads=8, ffn_size=14336, vocab_size=VOCAB)


CASES: dict[str, Case] = {
    "crystal-7b": Case(_crystal(32), 2048, 2, 32),
    "crystal-7b-lean": Case(_crystal(32), 2048, 4, 32, lean=True),
    "crystal-7b-8k": Case(_crystal(32), 8192, 1, 8, recomputed=14),
    "crystal-7b-8k-lean": Case(_crystal(32), 8192, 1, 8, lean=True),
    "crystal-7b-24-layers": Case(_crystal(24), 2048, 4, 32),
    "crystal-7b-24-layers-8k": Case(_crystal(24), 8192, 1, 8),
    "llama-8b": Case(_llama(32), 8192, 1, 8),
    "llama-8b-16-layers": Case(_llama(16), 8192, 1, 8),
}
DEFAULT_CASES = ("crystal-7b", "crystal-7b-lean", "crystal-7b-8k-lean", "crystal-7b-24-layers", "llama-8b-16-layers")


def recipe_of(shape: str, precision: str, folder: Path = Path("."), fused: bool = True) -> Recipe:
    case = CASES[shape]
    kind, _, params = precision.partition("-")
    phase = Phase(
        name="p", steps=100_000, batch_size=case.batch, sequence_length=case.length, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=3e-4, warmup=100),
    )  # fmt: skip
    return Recipe(
        name="bench",
        model=case.model,
        sources={"a": Source(path=str(folder / "a"))},
        phases=[phase],
        precision=Precision(compute="bf16")
        if kind == "bf16"
        else Precision(compute="fp8", fp8_recipe=kind, fp8_params=bool(params)),
        parallel=Parallel(
            micro_batch_size=case.micro_batch,
            recompute=Recompute(granularity="full", method="block", layers=case.recomputed)
            if case.recomputed
            else Recompute(),
        ),
        fusion=Fusion() if fused else Fusion(gradient_accumulation=False),
        optimizer=Optimizer(megatron={"use_precision_aware_optimizer": True} if case.lean else {}),
        checkpoints=Checkpoints(keep_phase_ends=False),
        logging=Logging(every=4),
    )


def random_tokens(shape: str, steps: int) -> np.ndarray:
    case = CASES[shape]
    return np.random.default_rng(0).integers(0, VOCAB, (steps, case.batch, case.length + 1))


# -------------------------------------------------------------------------------------------------------- the sides


def bare_side(shape: str, precision: str, steps: int) -> dict[str, Any]:
    """In this process."""
    import torch

    seconds = bare(settings_of(recipe_of(shape, precision), VOCAB), random_tokens(shape, steps))
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated()}


def megacode_side(shape: str, precision: str, steps: int, fused: bool) -> dict[str, Any]:
    """`megacode train` as a user starts it, ended once enough steps are in its metrics: it would go on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _corpus(folder / "a", random_tokens(shape, 2))
        (folder / "recipe.yaml").write_text(dump_recipe(recipe_of(shape, precision, folder, fused)))
        command = [
            sys.executable,
            "-m",
            "megacode.cli",
            "train",
            str(folder / "recipe.yaml"),
            "--run",
            str(folder / "run"),
        ]
        with open(folder / "log", "w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            records: list[dict[str, Any]] = []
            while len(records) < steps and child.poll() is None:
                time.sleep(0.5)
                records = _train_records(folder / "run" / "metrics.jsonl")
            child.send_signal(signal.SIGKILL)
            child.wait()
        if len(records) < steps:
            raise RuntimeError((folder / "log").read_text().strip().splitlines()[-1])
        print((folder / "log").read_text())
    return {"seconds": [r["seconds"] for r in records], "memory": max(r["memory_gb"] or 0 for r in records) * 1e9}


def _train_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [r for r in map(json.loads, whole.splitlines()) if r["kind"] == "train"]


def _corpus(prefix: Path, tokens: np.ndarray) -> None:
    """In a process of its own: this one must not import Megatron-Core, which would ask for the device."""
    np.save(f"{prefix}.npy", tokens.reshape(-1, tokens.shape[-1]).astype(np.uint16))
    script = (
        "import sys, numpy, torch\n"
        "from megacode.runtime import cpu\n"
        "cpu.quiet()\n"
        "if not torch.cuda.is_available(): cpu.install()\n"
        "from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder\n"
        "builder = IndexedDatasetBuilder(sys.argv[1] + '.bin', dtype=numpy.uint16)\n"
        "for row in numpy.load(sys.argv[1] + '.npy'): builder.add_document(torch.from_numpy(row.astype('int32')), [len(row)])\n"
        "builder.finalize(sys.argv[1] + '.idx')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(prefix)], check=True)


# --------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        default=",".join(DEFAULT_CASES),
        help=", ".join(CASES),
    )
    parser.add_argument(
        "--precisions", default="bf16,delayed,tensorwise,blockwise,tensorwise-params", help=", ".join(PRECISIONS)
    )
    parser.add_argument("--sides", default="bare,megacode", help=", ".join(SIDES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no measurement after this long")
    parser.add_argument("--output", type=Path, help="folder for the results page (default: docs/results)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, shape, precision = args.one
        print(
            "RESULT "
            + json.dumps(
                bare_side(shape, precision, args.steps)
                if side == "bare"
                else megacode_side(shape, precision, args.steps, fused=side == "megacode")
            )
        )
        return
    for given, known in ((args.cases, CASES), (args.precisions, PRECISIONS), (args.sides, SIDES)):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up")
    device, memory = _device()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    page = ""
    for shape in args.cases.split(","):
        for precision in args.precisions.split(","):
            for side in args.sides.split(","):
                row: dict[str, Any] = {"shape": shape, "precision": precision, "side": side}
                needed = memory_per_rank(recipe_of(shape, precision), VOCAB, 1).total
                if needed > 0.97 * memory:
                    row["none"] = f"would take {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
                elif time.monotonic() - started > 60 * args.minutes:
                    row["none"] = f"not measured: {args.minutes:g} minutes were over"
                else:
                    row |= _measured(shape, precision, side, args.steps, device)
                rows.append(row)
                print(f"{time.monotonic() - started:5.0f} s  {row}", flush=True)
                page = write_page(rows, args, device)
    print(page)


def _device() -> tuple[str, int]:
    """Name and bytes, asked in a process of its own: this one takes no memory of the device."""
    ask = (
        "import torch\nif torch.cuda.is_available():\n"
        "    print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, sep='\\t')"
    )
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    if not answer:
        sys.exit("bench/gpu: no CUDA device is visible here")
    name, _, size = answer.partition("\t")
    return name, int(size)


def _measured(shape: str, precision: str, side: str, steps: int, device: str) -> dict[str, Any]:
    """A row's numbers, or why there are `none`."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", side, shape, precision, "--steps", str(steps)],
        capture_output=True, text=True,
    )  # fmt: skip
    line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
    if line is None:
        why = [text for text in done.stderr.splitlines() if "Error" in text]
        return {"none": "failed: " + (why or done.stderr.splitlines() or ["no output"])[-1][:160]}
    result = json.loads(line[len("RESULT ") :])
    case = CASES[shape]
    seconds = statistics.median(result["seconds"][WARM_UP:])
    rate = case.batch * case.length / seconds
    flops = rate * flops_per_token(case.model, VOCAB, case.length)
    peak = peak_flops(device, "bf16")
    return {
        "ms": seconds * 1e3, "tokens": rate, "tflops": flops / 1e12, "mfu": flops / peak if peak else None,
        "memory": result["memory"] / 2**30,
    }  # fmt: skip


def _versions() -> str:
    ask = (
        "import json, torch, importlib.metadata as m\n"
        "def v(n):\n"
        "    try: return m.version(n)\n"
        "    except m.PackageNotFoundError: return 'none'\n"
        "print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, Transformer Engine ' + v('transformer-engine')"
        " + ', megatron-core ' + v('megatron-core'))"
    )
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def _ratio(upper: float | None, lower: float | None, digits: int) -> str:
    return f"{upper / lower:.{digits}f}" if upper and lower else ""


def write_page(rows: list[dict[str, Any]], args: argparse.Namespace, device: str) -> str:
    """Write the table to docs/results/gpu-DEVICE.md."""
    bases = {(r["shape"], r["precision"]): r["ms"] for r in rows if r["side"] == "bare" and "ms" in r}
    sixteen = {(r["shape"], r["side"]): r["ms"] for r in rows if r["precision"] == "bf16" and "ms" in r}
    about = (__doc__ or "").split("\n\n")
    lines = [
        f"# Training speed on one {device}", "",
        f"{time.strftime('%Y-%m-%d')}, {_versions()}. Command: `python bench/gpu.py --cases {args.cases} --precisions "
        f"{args.precisions} --sides {args.sides} --steps {args.steps}`. {about[2]}", "", about[3], "",
        *(f"- `{name}`: {CASES[name]}" for name in dict.fromkeys(r["shape"] for r in rows)), "",
        "| model | precision | side | ms/step | tokens/s | TFLOP/s | MFU | peak GiB | time vs bare | speed vs bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        start = f"| {r['shape']} | {r['precision']} | {r['side']} |"
        if "none" in r:
            lines.append(f"{start} {r['none']} | | | | | | |")
            continue
        base, slow = bases.get((r["shape"], r["precision"])), sixteen.get((r["shape"], r["side"]))
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else "unknown peak"
        lines.append(
            f"{start} {r['ms']:.0f} | {r['tokens']:,.0f} | {r['tflops']:.0f} | {mfu} | {r['memory']:.1f} | "
            f"{_ratio(r['ms'], base, 3)} | {_ratio(slow, r['ms'], 2)} |"
        )
    page = "\n".join(lines) + "\n"
    folder = args.output or Path(__file__).parents[1] / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu-{device.lower().replace(' ', '-')}.md").write_text(page)
    return page


if __name__ == "__main__":
    main()
