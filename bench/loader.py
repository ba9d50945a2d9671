"""Batches for training from a warm page cache: megacode's loader beside Megatron-Core's GPTDataset, one core each.

    python bench/loader.py [--tokens 200M] [--sequence-length 2048] [--repeats 5]

Without fill-in-the-middle both read the same synthetic uint16 corpus with the same weights. megacode makes whole batches (tokens,
labels, mask, positions, digest) on one thread, prefetching off; GPTDataset makes samples, which are stacked
into the same tensors. With fill-in-the-middle (rate 0.9, characters cut after decoding, as Crystal does) the corpus is Python
source tokenized by a tokenizer trained here. megatron-core has no fill-in-the-middle dataset of its own (0.16.1; Megatron-LM's
training package has one), so that row stands alone. Sides take turns; what counts is the median.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron_data import PlainTokenizer, build_blend

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def write_corpus(folder: Path, tokens: int, vocab: int) -> None:
    from megacode.data.indexed import write_index

    for number, (name, weight) in enumerate(WEIGHTS.items()):
        lengths = np.full(int(tokens * weight) // 1000, 1000, np.int32)
        ids = np.random.default_rng(number).integers(3, vocab, int(lengths.sum()), dtype=np.uint16)
        ids[999::1000] = 2
        ids.tofile(folder / f"{name}.bin")
        write_index(folder / f"{name}.idx", lengths, np.dtype(np.uint16))


def reader(
    folder: Path,
    sources: dict[str, float],
    length: int,
    batch: int,
    steps: int,
    vocab: int,
    tokenizer: Any,
    fim_rate: float,
) -> Any:
    """A StepReader over the sources: what the loader's thread calls."""
    from megacode.data.loader import StepReader
    from megacode.data.mixture import open_mixture
    from megacode.data.planning import token_counts
    from megacode.plan.plan import make_plan
    from megacode.recipe.schema import LearningRate, Model, Phase, Recipe, Source
    from megacode.recipe.schema import Mixture as MixtureSection

    recipe = Recipe(
        name="bench", model=Model(layers=1, hidden_size=8, heads=1, vocab_size=vocab),
        sources={name: Source(path=str(folder / name)) for name in sources},
        phases=[
            Phase(
                name="p", steps=steps, batch_size=batch, sequence_length=length, fim_rate=fim_rate,
                mixture=MixtureSection(sources=sources), learning_rate=LearningRate(peak=1.0),
            )
        ],
    )  # fmt: skip
    plan = make_plan(recipe, token_counts(recipe))
    return StepReader(open_mixture(plan), micro_batch_size=batch, tokenizer=tokenizer)


def megatron(folder: Path, length: int, samples: int, vocab: int) -> Any:
    import torch

    from megacode.megatron import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    return build_blend(
        GPTDataset, GPTDatasetConfig, [folder / name for name in WEIGHTS], list(WEIGHTS.values()), samples, length,
        folder / "cache", PlainTokenizer(vocab),
    )  # fmt: skip


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def python_corpus(folder: Path) -> Any:
    """About 4 MB of this installation's Python, tokenized by an 8k SentencePiece tokenizer with Crystal's added tokens."""
    import sysconfig

    from rich.console import Console

    from megacode.data.indexed import write_index
    from megacode.recipe.schema import TokenizerSection
    from megacode.tokenizer.tokenizer import load_tokenizer
    from megacode.tokenizer.training import train_tokenizer

    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(errors="replace"))
        size += len(texts[-1])
        if size > 4e6:
            break
    with Console().status("training a tokenizer"):
        train_tokenizer(iter(texts), folder / "t.model", 8000)
    tokenizer = load_tokenizer(
        TokenizerSection(path=str(folder / "t.model"), added_tokens="crystal", bos=True, eod=True)
    )
    documents = [
        [tokenizer.bos_id, *ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)
    ]
    np.concatenate([np.array(d, np.uint16) for d in documents]).tofile(folder / "python.bin")
    write_index(
        folder / "python.idx", np.array([len(d) for d in documents], np.int32), np.dtype(np.uint16)
    )
    return tokenizer


def main() -> None:
    from megacode.recipe.section import parse_count

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="200M")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    import torch
    from rich.table import Table

    from megacode.terminal import print_table, table_console

    torch.set_num_threads(1)
    length, batch, vocab = args.sequence_length, args.batch, 32000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = int(parse_count(args.tokens))
        write_corpus(folder, tokens, vocab)
        steps = 20
        ours = reader(folder, WEIGHTS, length, batch, steps, vocab, None, 0.0)
        theirs = megatron(folder, length, steps * batch, vocab)

        def read_ours() -> None:
            for step in range(steps):
                ours.read(step)

        def read_theirs() -> None:
            for step in range(steps):
                samples = [theirs[step * batch + i] for i in range(batch)]
                for key in ("tokens", "labels", "loss_mask", "position_ids"):
                    torch.stack([s[key] for s in samples])

        tokenizer = python_corpus(folder)
        with_fim = reader(
            folder, {"python": 1.0}, length, 16, 8, tokenizer.vocab_size, tokenizer, 0.9
        )
        without = reader(
            folder, {"python": 1.0}, length, 16, 8, tokenizer.vocab_size, tokenizer, 0.0
        )
        sides: dict[str, tuple[Callable[[], None], int]] = {
            "Megatron-Core GPTDataset": (read_theirs, steps * batch * length),
            "megacode": (read_ours, steps * batch * length),
            "megacode, Python, no FIM": (
                lambda: [without.read(s) for s in range(8)] and None,
                8 * 16 * length,
            ),
            "megacode, Python, FIM 0.9": (
                lambda: [with_fim.read(s) for s in range(8)] and None,
                8 * 16 * length,
            ),
        }
        for function, _ in sides.values():
            function()  # the page cache, and whatever is made on first use
        measured: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, (function, count) in sides.items():
                measured[name].append(count / seconds(function))
    base = statistics.median(measured["Megatron-Core GPTDataset"])
    table = Table(title=f"S = {length}, warm page cache, one thread, medians of {args.repeats}")
    for head in ("side", "M tokens/s", "ratio"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for name, rates in measured.items():
        table.add_row(
            name, f"{statistics.median(rates) / 1e6:.2f}", f"{statistics.median(rates) / base:.2f}"
        )
    print_table(table_console(), table)


if __name__ == "__main__":
    main()
