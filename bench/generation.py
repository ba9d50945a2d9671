"""Tokens a second that are written in batches: a checkpoint in Megatron-Core with megacode's cache, and its export in transformers.

    python bench/generation.py runs/crystal-tiny --table docs/results/generation.md

Both sides get the same prompts, of different lengths, in the same batches, write greedily, and never end early. Prompts of one
batch have different lengths: transformers pads them on the left, megacode forces the longer ones' own tokens. Times are of
writing alone, after one batch to warm up; each side has a process of its own. At the end the tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from megatron_data import machine_line

PROMPT = "def add(first, second):\n    return first + second\n\nThe language has names, values and"


def prompts_of(encode: Any, count: int, longest: int) -> list[list[int]]:
    """Tokens of the first 8 to `longest` tokens of a text, sorted by length as tasks are."""
    ids = encode(PROMPT * 20)
    return [ids[: 8 + (longest - 8) * number // max(count - 1, 1)] for number in range(count)]


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from megacode.megatron import cpu

    cpu.prepare()
    from megacode.evaluate.generate import Sampling, continue_batch
    from megacode.evaluate.model import open_model

    model = open_model(args.run)
    prompts = prompts_of(model.tokenizer.encode, args.prompts, args.longest)
    return timed(
        prompts,
        args.batch,
        lambda some: continue_batch(
            model, some, args.tokens, Sampling(), [0] * len(some), lambda _: False
        ),
    )


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.export, trust_remote_code=True, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prompts = prompts_of(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        args.prompts,
        args.longest,
    )

    def write(some: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, some))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in some], device=model.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in some])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, attention_mask=mask.to(model.device), do_sample=False, pad_token_id=0,
                max_new_tokens=args.tokens, min_new_tokens=args.tokens,
            )  # fmt: skip
        return [row[longest:] for row in made.tolist()]

    return timed(prompts, args.batch, write)


def timed(prompts: list[list[int]], size: int, write: Any) -> dict[str, Any]:
    write(prompts[:size])
    start, written = time.perf_counter(), []
    for first in range(0, len(prompts), size):
        written += write(prompts[first : first + size])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "written": written}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", type=Path)
    add("--export", type=Path, help=argparse.SUPPRESS)
    add("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    add("--prompts", type=int, default=64)
    add("--longest", type=int, default=64, help="tokens of the longest prompt")
    add("--tokens", type=int, default=64, help="written after each")
    add("--batch", type=int, default=32)
    add("--table", type=Path, help="write the table there")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args) if args.side == "ours" else theirs(args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        export = ["megacode", "export", str(args.run), f"{folder}/export"]
        subprocess.run([sys.executable, "-m", "megacode.cli", *export[1:]], check=True)
        sides = {}
        for side in ("ours", "theirs"):
            command = [sys.executable, *sys.argv, "--side", side, "--export", f"{folder}/export"]
            told = subprocess.run(command, check=True, capture_output=True, text=True)
            sides[side] = json.loads(told.stdout.splitlines()[-1])
    total = args.prompts * args.tokens
    rates = {side: total / found["seconds"] for side, found in sides.items()}
    pairs = list(zip(sides["ours"]["written"], sides["theirs"]["written"], strict=True))
    same = sum(mine == other for mine, other in pairs)
    import transformers

    table = "\n".join([
        "# Generation in batches", "",
        f"{date.today()}, {machine_line()}, transformers {transformers.__version__}; `python {' '.join(sys.argv)}`.",
        f"{args.prompts} prompts of 8 to {args.longest} tokens, {args.batch} at a time, {args.tokens} tokens after each, greedy.", "",
        "| | tokens/s | beside transformers |", "|---|---:|---:|",
        f"| megacode, Megatron-Core with a key/value cache | {rates['ours']:,.0f} | {rates['ours'] / rates['theirs']:.2f} x |",
        f"| transformers `generate` on the export | {rates['theirs']:,.0f} | 1.00 x |", "",
        f"Prompts after which both wrote the same tokens: {same} of {args.prompts}.",
    ]) + "\n"  # fmt: skip
    print(table)
    if args.table:
        args.table.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
