"""The verb `generate`: continue prompts with a checkpoint of any parallel layout, in one process, with a key/value cache."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.errors import UserError

EXAMPLE = """examples:
  megacode generate runs/crystal-tiny --prompt "def read(path):" --tokens 80
  megacode generate runs/crystal-tiny/checkpoints/step_00000110 --prompt "The language" --temperature 0.8 --seed 7
  megacode generate runs/crystal-tiny --prefix $'def area(r):\\n    ' --suffix $'\\n    return a\\n'"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the top_k / top_p part of the distribution."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


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
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prefix", help="code before the gap to fill (fill-in-the-middle)")
    parser.add_argument("--suffix", help="code after the gap to fill")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens to write at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this much probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from `logits` (float `[vocab]`)."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    logits = logits.double() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.index_fill(0, order[outside], 0.0)
    return int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator))


@torch.no_grad()
def continue_tokens(
    model: Any, prompt: Sequence[int], limit: int, stop: int | None, sampling: Sampling, vocab_size: int
) -> Iterator[int]:
    """Yield up to `limit` tokens after `prompt`, one by one; ends before the token `stop`.

    The whole prompt passes once and fills the cache; then one position a step.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + limit)
    tokens, position = list(prompt), 0
    for _ in range(limit):
        fresh = torch.tensor([tokens], device=device)
        count = fresh.shape[1]
        positions = torch.arange(position, position + count, device=device)[None]
        # Hidden where the key comes after the query; one new query sees every cached key.
        mask = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)[None, None] if count > 1 else None
        logits = model(fresh, positions, mask, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(count)
        position += count
        drawn = next_token(logits[0, -1, :vocab_size].float().cpu(), sampling, generator)
        if drawn == stop:
            return
        yield drawn
        tokens = [drawn]


def open_for_inference(checkpoint: Path) -> tuple[Any, Any, Any]:
    """(recipe, tokenizer, model in evaluation mode) of a checkpoint, on one process whatever layout wrote it.

    Raises:
        UserError: no complete checkpoint there, or it names no tokenizer.
    """
    from megacode.runtime import cpu

    cpu.quiet()
    if not torch.cuda.is_available():
        cpu.install()
    from megacode.data.tokenizer import load_tokenizer
    from megacode.recipe.load import load_recipe
    from megacode.recipe.schema import Fusion, Parallel, Precision
    from megacode.runtime.distributed import Launch, initialize
    from megacode.runtime.launch import free_port
    from megacode.train.checkpoint import find_checkpoint, load_checkpoint

    path = find_checkpoint(checkpoint)
    recipe = load_recipe(path / "recipe.yaml")
    # FP8 is a way to train: the weights of a run are bf16's, and inference computes in that.
    precision = Precision(compute="bf16") if recipe.precision.compute == "fp8" else recipe.precision
    # Which stage has which layers (model.megatron.num_layers_in_first_pipeline_stage ...) is the layout's, too.
    kept = {name: value for name, value in recipe.model.megatron.items() if "pipeline" not in name}
    model = recipe.model.model_copy(update={"megatron": kept})
    recipe = recipe.model_copy(
        update={"parallel": Parallel(), "fusion": Fusion(), "precision": precision, "model": model}
    )
    if recipe.tokenizer is None:
        raise UserError(f"{path / 'recipe.yaml'}: names no tokenizer, and text needs one; add `tokenizer:` to it")
    tokenizer = load_tokenizer(recipe.tokenizer)
    initialize(recipe.parallel, recipe.seed, Launch(0, 1, 0, "127.0.0.1", free_port(), "single process"))
    from megacode.model.gpt import build_model

    chunks = build_model(recipe, tokenizer.vocab_size)
    load_checkpoint(path, chunks, None)
    return recipe, tokenizer, chunks[0].eval()


def infill_prompt(recipe: Any, tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Fill-in-the-middle prompt in prefix-suffix-middle order (arXiv 2207.14255), with the recipe's control tokens."""
    fim = recipe.data.fim
    return [
        *([tokenizer.bos_id] if recipe.tokenizer.bos else []),
        tokenizer.token_id(fim.prefix), *tokenizer.encode(prefix),
        tokenizer.token_id(fim.suffix), *tokenizer.encode(suffix),
        tokenizer.token_id(fim.middle),
    ]  # fmt: skip


def prompts_of(args: argparse.Namespace, recipe: Any, tokenizer: Any) -> list[Prompt]:
    """What the command line asks for. UserError: a prompt is empty, or too long for the model."""
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
        if recipe.model.position_embedding == "learned" and len(prompt.tokens) + args.tokens - 1 > positions:
            raise UserError(
                f"--tokens {args.tokens}: with the {len(prompt.tokens):,} of the prompt these are more than the "
                f"{positions:,} positions that the model has learned; give a smaller number, or a shorter prompt"
            )
    return prompts


def continuation(tokenizer: Any, context: Sequence[int], written: Sequence[int]) -> str:
    """Text of `written` where it follows `context`: on its own, tokenizers such as Llama 2's leave its first blank out."""
    start, whole = tokenizer.decode(context), tokenizer.decode([*context, *written])
    # Some show the bytes of a whole character otherwise once a broken one follows.
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(written)


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

    from megacode.runtime.distributed import shutdown

    _check_arguments(args)
    recipe, tokenizer, model = open_for_inference(args.checkpoint)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    console = Console(highlight=False, soft_wrap=True)
    try:
        for prompt in prompts_of(args, recipe, tokenizer):
            stop = tokenizer.eod_id if recipe.tokenizer.eod else None
            written = list(continue_tokens(model, prompt.tokens, args.tokens, stop, sampling, tokenizer.vocab_size))
            text = continuation(tokenizer, prompt.context, written)
            if console.is_terminal:
                console.print(Text(prompt.before, "dim") + Text(text, "bold") + Text(prompt.after, "dim"))
            else:  # as it is: rich leaves carriage returns and other control characters out
                sys.stdout.write(prompt.before + text + prompt.after + "\n")
    finally:
        shutdown()
    return 0
