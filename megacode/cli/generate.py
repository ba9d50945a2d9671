"""The verb `generate`: continue prompts with a checkpoint of any parallel layout, in one process, with a key/value cache."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode generate runs/crystal-tiny --prompt "def read(path):" --tokens 80
  megacode generate runs/crystal-tiny/checkpoints/step_00000110 --prompt "The language" --temperature 0.8 --seed 7
  megacode generate runs/crystal-tiny --prefix $'def area(r):\\n    ' --suffix $'\\n    return a\\n'"""


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        before, after: shown around what is written.
        context: ids of `before`, as far as what is written is text that goes on from it.
        tokens: what the model reads.
    """

    before: str
    after: str
    context: Sequence[int]
    tokens: Sequence[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run folder or checkpoint folder")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; may be given several times"
    )
    parser.add_argument("--prefix", help="code before the gap to fill (fill-in-the-middle)")
    parser.add_argument("--suffix", help="code after the gap to fill")
    parser.add_argument(
        "--tokens", type=int, default=64, help="how many tokens to write at most (default: 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens that hold this much probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")


def prompts_of(args: argparse.Namespace, recipe: Any, tokenizer: Any) -> list[Prompt]:
    """What the command line asks for. UserError: a prompt is empty, or too long for the model."""
    from megacode.evaluate.generate import infill_prompt

    bos = [tokenizer.bos_id] if recipe.tokenizer.bos else []
    prompts = []
    for text in args.prompt:
        ids = tokenizer.encode(text)
        prompts.append(Prompt(text, "", ids, [*bos, *ids]))
    if args.prefix is not None or args.suffix is not None:
        before, after = args.prefix or "", args.suffix or ""
        tokens = infill_prompt(recipe, tokenizer, before, after)
        prompts.append(Prompt(before, after, tokenizer.encode(before), tokens))
    positions = recipe.model.context_length or max(phase.sequence_length for phase in recipe.phases)
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(
                "--prompt: is empty and the tokenizer's recipe has no begin-of-sequence token to start from"
            )
        # The last token that is written is not read.
        if (
            recipe.model.position_embedding == "learned"
            and len(prompt.tokens) + args.tokens - 1 > positions
        ):
            raise UserError(
                f"--tokens {args.tokens}: with the {len(prompt.tokens):,} of the prompt these are more than the "
                f"{positions:,} positions that the model has learned; give a smaller number, or a shorter prompt"
            )
    return prompts


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.prompt and args.prefix is None and args.suffix is None:
        raise UserError("give --prompt TEXT (or --prefix and --suffix to fill a gap)")
    for option, value, fine, expected in (
        ("tokens", args.tokens, args.tokens >= 1, "1 or more"),
        ("temperature", args.temperature, 0 <= args.temperature < math.inf, "0 or more"),
        ("top-k", args.top_k, args.top_k >= 0, "0 or more"),
        ("top-p", args.top_p, 0 < args.top_p <= 1, "more than 0 and at most 1"),
    ):
        if not fine:
            raise UserError(f"--{option}: expected {expected}, not {value}")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from megacode.evaluate.generate import Sampling, continuation, continue_tokens
    from megacode.megatron.distributed import shutdown
    from megacode.megatron.inference import open_for_inference

    _check_arguments(args)
    recipe, tokenizer, model = open_for_inference(args.checkpoint)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    console = Console(highlight=False, soft_wrap=True)
    try:
        for prompt in prompts_of(args, recipe, tokenizer):
            stop = tokenizer.eod_id if recipe.tokenizer.eod else None
            written = list(
                continue_tokens(
                    model, prompt.tokens, args.tokens, stop, sampling, tokenizer.vocab_size
                )
            )
            text = continuation(tokenizer, prompt.context, written)
            if console.is_terminal:
                console.print(
                    Text(prompt.before, "dim") + Text(text, "bold") + Text(prompt.after, "dim")
                )
            else:  # as it is: rich leaves carriage returns and other control characters out
                sys.stdout.write(prompt.before + text + prompt.after + "\n")
    finally:
        shutdown()
    return 0
