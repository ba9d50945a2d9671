"""Fill-in-the-middle: tokens per second of one core, beside Megatron-LM's GPTFIMDataset on the same files in the same run.

    python bench/fim.py [--megatron-fim FILE] [--rate 0.9] [--sequence-length 2048] [--json FILE]

The corpus is this Python installation's standard library, with a SentencePiece tokenizer trained on it. Both sides use that
tokenizer, deliver torch tensors in micro-batches of 8 from files in the page cache, in one thread on one core, and take
turns; medians count. megatron-core as released has no such dataset; Megatron-LM's repository has one outside the package:
megatron/training/datasets/fim_dataset.py. Without that file only megacode is measured, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
from megatron_data import PlainTokenizer, build_blend, machine_line

from megacode.data.indexed import token_dtype, write_index
from megacode.data.loader import StepReader
from megacode.data.mixture import open_mixture
from megacode.data.planning import plan_with_data
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.training import train_tokenizer

MICRO_BATCH, STEPS_A_ROUND = 8, 16
Side = Callable[[], int]
"""One round; how many tokens it delivered."""


def code_corpus(folder: Path) -> tuple[Path, Tokenizer]:
    """`<s>` text `</s>` of every source of the standard library, with Crystal's added tokens in the vocabulary."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f
        for f in sorted(root.rglob("*.py"))
        if not {"site-packages", "test", "tests"} & set(f.parts)
    ]
    texts = [text for file in files if (text := file.read_text(encoding="utf-8", errors="replace"))]
    train_tokenizer(
        [text for text in texts[::8] if len(text) < 50_000], folder / "tokenizer.model", 8000
    )
    tokenizer = load_tokenizer(
        schema.TokenizerSection(
            path=str(folder / "tokenizer.model"), added_tokens="crystal", bos=True
        )
    )
    dtype, lengths = token_dtype(tokenizer.vocab_size), []
    with open(folder / "code.bin", "wb") as file:
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0], tokenizer.eod_id]
            file.write(np.asarray(ids, dtype).tobytes())
            lengths.append(len(ids))
    write_index(folder / "code.idx", np.array(lengths, np.int32), dtype)
    return folder / "code", tokenizer


def ours(
    corpus: Path, tokenizer: Tokenizer, sequence_length: int, rate: float, **data: object
) -> Side:
    """megacode's loader; `data`: keys of the recipe's data section."""
    recipe = schema.Recipe.model_validate(
        {
            "name": "bench",
            "model": {"layers": 1, "hidden_size": 8, "heads": 1},
            "sources": {"code": {"path": str(corpus)}},
            "data": data,
            "phases": [{
                "name": "only", "steps": 10**6, "batch_size": MICRO_BATCH, "sequence_length": sequence_length,
                "learning_rate": {"schedule": "constant", "peak": 1e-3}, "fim_rate": rate,
                "mixture": {"sources": {"code": 1}},
            }],
        }
    )  # fmt: skip
    plan = plan_with_data(recipe)
    reader = StepReader(open_mixture(plan), micro_batch_size=MICRO_BATCH, tokenizer=tokenizer)
    steps = count()

    def read() -> int:
        import torch

        tokens = 0
        for _ in range(STEPS_A_ROUND):
            (batch,) = reader.read(next(steps)).micro_batches
            for array in (batch.labels, batch.loss_mask, batch.position_ids):
                torch.from_numpy(array)
            tokens += torch.from_numpy(batch.tokens).numel()
        return tokens

    return read


def megatrons(
    file: Path, corpus: Path, tokenizer: Tokenizer, sequence_length: int, rate: float, samples: int
) -> Side:
    """GPTFIMDataset of the given file, as its own builder makes it."""
    from torch.utils.data import default_collate

    spec = importlib.util.spec_from_file_location("fim_dataset", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--megatron-fim: {file} is no Python file")
    sys.modules["fim_dataset"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = PlainTokenizer(
        tokenizer.vocab_size, tokenizer.eod_id, tokenizer.token_id("<|fim_pad|>"), tokenizer
    )
    names = {key: f"<|fim_{key}|>" for key in ("prefix", "middle", "suffix", "pad")}
    blend = build_blend(
        module.GPTFIMDataset, module.GPTFIMDatasetConfig, [corpus], [1.0], samples, sequence_length,
        corpus.parent / "cache", plain, fim_rate=rate, fim_spm_rate=0.5, fim_extra_tokens={**names, "eod": "<eod>"},
    )  # fmt: skip
    indices = count()

    def read() -> int:
        return sum(
            int(
                default_collate([blend[next(indices)] for _ in range(MICRO_BATCH)])[
                    "tokens"
                ].numel()
            )
            for _ in range(STEPS_A_ROUND)
        )

    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megatron-fim", type=Path, metavar="FILE", help="Megatron-LM's fim_dataset.py"
    )
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    args = parser.parse_args()

    import torch
    from rich.console import Console
    from rich.table import Table

    from megacode.terminal import print_table, table_console

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    console, length = Console(), args.sequence_length
    with tempfile.TemporaryDirectory() as temporary:
        with console.status("training a tokenizer, tokenizing the standard library"):
            corpus, tokenizer = code_corpus(Path(temporary))
        sides = {
            "megacode": ours(corpus, tokenizer, length, args.rate),
            "megacode, document level": ours(
                corpus, tokenizer, length, args.rate, fim={"level": "document"}
            ),
            "megacode, packed": ours(corpus, tokenizer, length, args.rate, packing="best_fit"),
            "megacode, packed, document level": ours(
                corpus, tokenizer, length, args.rate, packing="best_fit", fim={"level": "document"}
            ),
            "megacode without FIM": ours(corpus, tokenizer, length, 0.0),
        }
        if args.megatron_fim:
            samples = (args.rounds + 1) * STEPS_A_ROUND * MICRO_BATCH
            sides["Megatron-LM GPTFIMDataset"] = megatrons(
                args.megatron_fim, corpus, tokenizer, length, args.rate, samples
            )
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                started = time.perf_counter()
                tokens = side()
                if number:  # the first round warms the page cache
                    rates[name].append(tokens / (time.perf_counter() - started))

    base = statistics.median(rates["megacode"])
    table = Table(title=f"FIM rate {args.rate}, S = {length}, one core", caption=machine_line())
    for head in ("side", "M tokens/s, median", "lowest to highest", "megacode is"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values) / 1e6:.2f} to {max(values) / 1e6:.2f}"
        table.add_row(name, f"{middle / 1e6:.2f}", spread, f"{base / middle:.2f} x")
    if not args.megatron_fim:
        table.add_row(
            "Megatron-LM GPTFIMDataset", "-", "not in megatron-core; see --megatron-fim", "-"
        )
    print_table(table_console(), table)
    if args.json:
        numbers = {"rate": args.rate, "sequence_length": length, "tokens_per_second": rates}
        args.json.write_text(json.dumps({"machine": machine_line(), **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
