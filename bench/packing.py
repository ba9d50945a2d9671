"""Best-fit packing: how fast packs are made, how full they are, and what reading them costs beside windows.

    python bench/packing.py [--documents 10M] [--repeats 5]

Documents have the lengths of a log-normal (median 400 tokens, sigma 1.3; mean about 930), a stand-in for web text and code.
Making is timed with everything that the first start of a run does: lengths read from the .idx, packs, the index written and
flushed to disk. Reading is whole batches from a warm page cache on one thread, prefetching off; the two sides take turns,
medians count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megacode.data.indexed import open_shard, write_index
from megacode.data.loader import StepReader
from megacode.data.mixture import open_mixture
from megacode.data.pack_index import index_path, open_pack_index
from megacode.data.packing_report import packing_losses
from megacode.data.planning import plan_with_data
from megacode.recipe.schema import Recipe
from megacode.recipe.section import parse_count

BATCH, STEPS_A_ROUND, READ_TOKENS = 64, 12, 200_000_000


def write_corpus(prefix: Path, documents: int, with_tokens: bool) -> None:
    lengths = np.clip(
        np.random.default_rng(0).lognormal(np.log(400), 1.3, documents), 1, 2**30
    ).astype(np.int32)
    write_index(Path(f"{prefix}.idx"), lengths, np.dtype(np.uint16))
    with open(f"{prefix}.bin", "wb") as file:
        if with_tokens:
            for first in range(0, documents, 10_000):
                size = int(lengths[first : first + 10_000].sum())
                np.random.default_rng(first).integers(3, 32_000, size, dtype=np.uint16).tofile(file)
        file.truncate(
            int(lengths.sum(dtype=np.int64)) * 2
        )  # lengths alone need no tokens: a file of holes


def recipe_of(prefix: Path, length: int, packing: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "bench",
            "model": {"layers": 1, "hidden_size": 8, "heads": 1, "vocab_size": 32_000},
            "sources": {"s": {"path": str(prefix)}},
            "data": {"packing": packing},
            "phases": [{
                "name": "p", "steps": 10**6, "batch_size": BATCH, "sequence_length": length,
                "learning_rate": {"peak": 1e-3}, "mixture": {"sources": {"s": 1}},
            }],
        }
    )  # fmt: skip


def making(prefix: Path, lengths: list[int]) -> list[dict[str, Any]]:
    shard, rows = open_shard(prefix), []
    for length in lengths:
        start = time.perf_counter()
        index = open_pack_index(shard, length)
        made = time.perf_counter() - start
        start = time.perf_counter()
        open_pack_index(shard, length)
        opened = time.perf_counter() - start
        (losses,) = packing_losses(plan_with_data(recipe_of(prefix, length, "best_fit")))
        rows.append(
            {
                "length": length,
                "rate": shard.documents / made / 1e6,
                "opened": opened * 1e3,
                "full": index.tokens / (index.packs * (length + 1)),
                "cut": index.cut / index.documents,
                "concatenated": losses.cut["concatenate"],
                "bytes": index_path(shard, length, None).stat().st_size / index.documents,
            }
        )
    return rows


def reading(prefix: Path, length: int, repeats: int) -> dict[str, float]:
    """Million tokens of whole sequences a second, by packing."""
    sides = {}
    for packing in ("concatenate", "best_fit"):
        plan = plan_with_data(recipe_of(prefix, length, packing))
        sides[packing] = (StepReader(open_mixture(plan), micro_batch_size=BATCH), count())
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, (reader, steps) in sides.items():
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                reader.read(next(steps))
            if number:
                rates[name].append(
                    STEPS_A_ROUND * BATCH * length / (time.perf_counter() - start) / 1e6
                )
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=parse_count, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "large", args.documents, with_tokens=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{args.documents:,} documents in one shard\n")
        print(
            "| length | M documents/s | full | cut | cut by concatenating | opened again | index bytes/document |"
        )
        print("|---|---|---|---|---|---|---|")
        for row in making(folder / "large", [2048, 8192, 32768]):
            print(
                f"| {row['length']:,} | {row['rate']:.2f} | {100 * row['full']:.3f} % | {100 * row['cut']:.2f} % | "
                f"{100 * row['concatenated']:.1f} % | {row['opened']:.1f} ms | {row['bytes']:.1f} |"
            )
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"\nmemory above that of writing the corpus: {grown:,.0f} MiB\n")
        write_corpus(folder / "read", READ_TOKENS // 930, with_tokens=True)
        print("| reading, 2,048 tokens | M tokens/s |\n|---|---|")
        for name, rate in reading(folder / "read", 2048, args.repeats).items():
            print(f"| {name} | {rate:.1f} |")


if __name__ == "__main__":
    main()
