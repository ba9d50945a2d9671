"""Training speed on one CUDA device: `megacode train` against a bare Megatron-Core loop, bf16 and every FP8 recipe.

    python bench/gpu.py [--cases crystal-7b,llama-8b-8k-reduced] [--precisions bf16,delayed,tensorwise-params] [--minutes 9]

Each measurement is a fresh process. `bare` is GPTModel, DistributedDataParallel, optimizer and schedule of Megatron-Core
with batches ready in memory; `megacode` is the command line on a tokenized corpus: loader, metrics and log included, from the
end of one step to the end of the next. Same model, same batch shape, same fusions; what counts is the median step after warm-up.
`-params` keeps the layers' matrices in FP8 alone, which lets the full 7B fit; a `-reduced` case has as many layers as fit this
device in every precision. `unfused` (on request) is megacode with fusion.gradient_accumulation off.

TFLOP/s count 6 FLOPs for every weight of a matrix product and token, plus attention with the causal half counted in full
(PaLM's convention, see megacode.plan.estimate); MFU is against the dense bf16 peak, also for FP8.

Writes docs/results/gpu-DEVICE.md after every measurement, so that a visit that ends early leaves what it measured; what earlier
runs wrote there stays below.
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
from pathlib import Path
from typing import Any

import numpy as np
from bare import bare, settings_of
from gpu_cases import CASES, DEFAULT_CASES, PRECISIONS, Case, fitting_layers, recipe_of, refusal
from gpu_page import Page

from megacode.data.indexed import token_dtype, write_index
from megacode.plan.devices import peak_flops
from megacode.plan.estimate import flops_per_token
from megacode.recipe.load import dump_recipe

WARM_UP = 4
SIDES = ("bare", "megacode", "unfused")


def random_tokens(case: Case, steps: int) -> np.ndarray:
    vocab = case.model(1).vocab_size
    return np.random.default_rng(0).integers(0, vocab, (steps, case.batch, case.length + 1))


# -------------------------------------------------------------------------------------------------------- the sides


def bare_side(case: Case, layers: int, precision: str, steps: int) -> dict[str, Any]:
    """In this process."""
    import torch

    recipe = recipe_of(case, layers, precision)
    seconds = bare(settings_of(recipe, recipe.model.vocab_size), random_tokens(case, steps))
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated()}


def megacode_side(
    case: Case, layers: int, precision: str, steps: int, fused: bool
) -> dict[str, Any]:
    """`megacode train` as a user starts it, ended once enough steps are in its metrics: it would go on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _corpus(folder / "a", random_tokens(case, 2))
        (folder / "recipe.yaml").write_text(
            dump_recipe(recipe_of(case, layers, precision, folder, fused))
        )
        command = [
            sys.executable,
            "-m",
            "megacode.cli",
            "train",
            folder / "recipe.yaml",
            "--run",
            folder / "run",
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
    return {
        "seconds": [r["seconds"] for r in records],
        "memory": max(r["memory_gb"] or 0 for r in records) * 1e9,
    }


def _train_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [r for r in map(json.loads, whole.splitlines()) if r["kind"] == "train"]


def _corpus(prefix: Path, tokens: np.ndarray) -> None:
    rows, dtype = tokens.reshape(-1, tokens.shape[-1]), token_dtype(int(tokens.max()) + 1)
    rows.astype(dtype).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.full(len(rows), rows.shape[1], np.int32), dtype)


# --------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=", ".join(CASES))
    parser.add_argument(
        "--precisions", help=f"of {', '.join(PRECISIONS)}; default: all that this device has"
    )
    parser.add_argument("--sides", default="bare,megacode", help=", ".join(SIDES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start no measurement after this long"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results page (default: docs/results)"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up")
    if args.one:
        side, name, layers, precision = args.one
        what = (CASES[name], int(layers), precision, args.steps)
        print(
            "RESULT "
            + json.dumps(
                bare_side(*what) if side == "bare" else megacode_side(*what, side == "megacode")
            )
        )
        return
    for given, known in (
        (args.cases, CASES),
        (args.precisions or "bf16", PRECISIONS),
        (args.sides, SIDES),
    ):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    device, memory, refused = _device()
    can = [name for name in PRECISIONS if name.partition("-")[0] not in refused]
    precisions = args.precisions.split(",") if args.precisions else can
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    text = ""
    page = Page(
        args.output or Path(__file__).parents[1] / "docs" / "results", device, "\n\n".join(__doc__.split("\n\n")[2:4]),
        f"python bench/gpu.py --cases {args.cases} --precisions {','.join(precisions)} --sides {args.sides} --steps {args.steps}",
    )  # fmt: skip
    for name in args.cases.split(","):
        layers = fitting_layers(CASES[name], [p for p in precisions if p in can], memory)
        for precision in precisions:
            for side in args.sides.split(","):
                row: dict[str, Any] = {
                    "case": name,
                    "layers": layers,
                    "precision": precision,
                    "side": side,
                }
                why = refused.get(precision.partition("-")[0]) or refusal(
                    CASES[name], layers, precision, memory
                )
                if why:
                    row["none"] = why
                elif time.monotonic() - started > 60 * args.minutes:
                    row["none"] = f"not measured: {args.minutes:g} minutes were over"
                else:
                    row |= _measured(name, layers, precision, side, args.steps, device)
                rows.append(row)
                print(f"{time.monotonic() - started:5.0f} s  {row}", flush=True)
                text = page.write(rows)
    print(text)


def _device() -> tuple[str, int, dict[str, str]]:
    """Name, bytes, and why this machine cannot train by FP8 recipes that it cannot; asked in a process of its own: this one
    takes no memory of the device."""
    kinds = sorted({name.partition("-")[0] for name in PRECISIONS} - {"bf16"})
    ask = (
        "import json, torch\n"
        "from megacode.plan.hardware import fp8_refusal\n"
        "from megacode.megatron.hardware import detect\n"
        "if torch.cuda.is_available():\n"
        f"    refused = {{kind: why for kind in {kinds} if (why := fp8_refusal(kind, detect()))}}\n"
        "    print(json.dumps([torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, refused]))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    if not done.stdout.strip():
        sys.exit("bench/gpu: no CUDA device is visible here")
    name, memory, refused = json.loads(done.stdout.strip().splitlines()[-1])
    return name, memory, refused


def _measured(
    name: str, layers: int, precision: str, side: str, steps: int, device: str
) -> dict[str, Any]:
    """A row's numbers, or why there are `none`."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", side, name, str(layers), precision, "--steps", str(steps)],
        capture_output=True, text=True,
    )  # fmt: skip
    line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
    if line is None:
        why = [text for text in done.stderr.splitlines() if "Error" in text]
        return {"none": "failed: " + (why or done.stderr.splitlines() or ["no output"])[-1][:160]}
    result = json.loads(line[len("RESULT ") :])
    case = CASES[name]
    model = case.model(layers)
    seconds = statistics.median(result["seconds"][WARM_UP:])
    rate = case.batch * case.length / seconds
    flops = rate * flops_per_token(model, model.vocab_size or 0, case.length)
    peak = peak_flops(device, "bf16")
    return {
        "ms": seconds * 1e3, "tokens": rate, "tflops": flops / 1e12, "mfu": flops / peak if peak else None,
        "memory": result["memory"] / 2**30,
    }  # fmt: skip


if __name__ == "__main__":
    main()
