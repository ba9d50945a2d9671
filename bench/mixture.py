"""Opening a mixture of true size: megacode beside Megatron-Core's BlendedMegatronDatasetBuilder, with both growth curves.

    python bench/mixture.py [--sizes 0.1,0.3,1,3] [--largest 1400] [--plot FILE.png]

Sizes are billions of tokens, spread over Crystal's phase 2 sources by its weights. The datasets are sparse files of true size
and shape (documents of 1,000 tokens): index headers, lengths and offsets are written where a reader looks, .bin files are holes.
megacode opens sizes far beyond those (up to `--largest`, with the real recipe's plan) with only the index's head and tail
written; Megatron-Core reads whole indexes, so its sizes stay small. Every measurement is a fresh process: seconds from
before opening to the first batch's sample addresses, growth of resident memory over the imports, bytes written to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from megatron_data import PlainTokenizer, be_one_rank, build_blend

LENGTH, BATCH, DOCUMENT = 2048, 2112, 1000
WEIGHTS = {  # Crystal phase 2 (arXiv 2411.04156; its public params.yaml)
    "arxiv": 0.016083857723861224, "book": 0.015358576352403003, "c4": 0.09909981505117808,
    "commoncrawl": 0.1983897689052003, "github": 0.018454606218343703, "stackexchange": 0.011784941022274698,
    "wikipedia": 0.012710859995188247, "starcoder": 0.6281175747315507,
}  # fmt: skip


def resident() -> int:
    """Bytes of resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def write_dataset(prefix: Path, tokens: int, whole: bool) -> None:
    """A .bin/.idx pair of `tokens` uint16 tokens in documents of 1,000; `whole` writes every length and offset, else only what
    stands at the index's ends (the rest are holes)."""
    count = max(tokens // DOCUMENT, 1)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(head)
        parts = ((np.int32, lambda i: np.full(len(i), DOCUMENT), count), (np.int64, lambda i: i * DOCUMENT * 2, count),
                 (np.int64, lambda i: i, count + 1))  # fmt: skip
        for dtype, values, number in parts:
            start, size = file.tell(), np.dtype(dtype).itemsize
            first = 0 if whole else max(number - 1000, 0)
            for chunk in range(first, number, 10**7):
                index = np.arange(chunk, min(chunk + 10**7, number))
                file.seek(start + chunk * size)
                file.write(values(index).astype(dtype).tobytes())
            file.seek(start + number * size)
        file.truncate()
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(count * DOCUMENT * 2)


def measure_ours(folder: Path, tokens: int) -> dict[str, float]:
    from megacode.data.mixture import open_mixture
    from megacode.data.planning import token_counts
    from megacode.plan.plan import make_plan
    from megacode.recipe.schema import LearningRate, Model, Phase, Recipe, Source
    from megacode.recipe.schema import Mixture as MixtureSection

    steps = max(tokens // (LENGTH * BATCH), 1)
    recipe = Recipe(
        name="bench", model=Model(layers=1, hidden_size=8, heads=1, vocab_size=32032),
        sources={name: Source(path=str(folder / name)) for name in WEIGHTS},
        phases=[
            Phase(
                name="p", steps=steps, batch_size=BATCH, sequence_length=LENGTH, mixture=MixtureSection(sources=WEIGHTS),
                learning_rate=LearningRate(peak=1.0),
            )
        ],
    )  # fmt: skip
    before, started = resident(), time.perf_counter()
    plan = make_plan(recipe, token_counts(recipe))
    mixture = open_mixture(plan)
    first, last = mixture.step(0), mixture.step(plan.total_steps - 1)
    assert len(first) == len(last) == BATCH
    return {"seconds": time.perf_counter() - started, "memory": resident() - before}


def measure_megatron(folder: Path, tokens: int) -> dict[str, float]:
    import torch

    from megacode.megatron import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megatron.core.datasets import blended_megatron_dataset_builder  # noqa: F401  # its import is not measured
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    be_one_rank()
    before, started = resident(), time.perf_counter()
    dataset = build_blend(
        GPTDataset, GPTDatasetConfig, [folder / name for name in WEIGHTS], list(WEIGHTS.values()), tokens // LENGTH, LENGTH,
        folder / "cache", PlainTokenizer(32032),
    )  # fmt: skip
    assert dataset[0] is not None
    return {"seconds": time.perf_counter() - started, "memory": resident() - before}


def disk_used(folder: Path) -> int:
    return (
        sum(os.stat(p).st_blocks * 512 for p in folder.rglob("*") if p.is_file())
        if folder.exists()
        else 0
    )


def measure(side: str, billions: float) -> dict[str, Any]:
    """One fresh process over datasets of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, weight in WEIGHTS.items():
            write_dataset(
                folder / name, int(billions * 1e9 * weight * 1.02), whole=side == "megatron"
            )
        before = disk_used(folder)
        done = subprocess.run(
            [sys.executable, __file__, "--one", side, str(folder), str(int(billions * 1e9))],
            capture_output=True,
            text=True,
        )
        line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"{side} at {billions} B tokens failed:\n{done.stderr[-2000:]}")
        return {
            "side": side,
            "billions": billions,
            **json.loads(line[7:]),
            "disk": max(disk_used(folder) - before, 0),
        }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, key, title, unit in zip(
        axes,
        ("seconds", "memory", "disk"),
        ("seconds", "resident memory, MB", "written to disk, MB"),
        (1, 1e6, 1e6),
        strict=True,
    ):
        for side, colour in (("megatron", "#d55e00"), ("megacode", "#0072b2")):
            points = [(r["billions"], max(r[key] / unit, 1e-3)) for r in rows if r["side"] == side]
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=side)
        axis.set(xscale="log", yscale="log", title=title, xlabel="billion tokens")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="0.1,0.3,1,3")
    parser.add_argument("--largest", type=float, default=1400.0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, folder, tokens = args.one
        function = measure_ours if side == "megacode" else measure_megatron
        print("RESULT " + json.dumps(function(Path(folder), int(tokens))))
        return
    from rich.progress import track
    from rich.table import Table

    from megacode.terminal import print_table, table_console

    sizes = [float(size) for size in args.sizes.split(",")]
    plans = [("megatron", size) for size in sizes] + [
        ("megacode", size) for size in [*sizes, 100.0, args.largest]
    ]
    rows = [measure(side, size) for side, size in track(plans, "measuring", transient=True)]
    table = Table(title="Opening Crystal's phase 2 mixture, up to the first batch's samples")
    for head in ("side", "billion tokens", "seconds", "memory MB", "disk MB"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for r in rows:
        table.add_row(
            r["side"],
            f"{r['billions']:g}",
            f"{r['seconds']:.3f}",
            f"{r['memory'] / 1e6:.0f}",
            f"{r['disk'] / 1e6:.1f}",
        )
    print_table(table_console(), table)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
