"""The verb `generate`: continue prompts with a checkpoint, in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.cli.arguments import at_least, fraction
from megacode.errors import UserError
from megacode.tokenizer.chat import BUILT_IN

EXAMPLE = """examples:
  megacode generate runs/crystal-tiny --prompt "def read(path):" --tokens 80
  megacode generate runs/crystal-tiny --prompt "The language" --temperature 0.8 --seed 7
  megacode generate runs/crystal-tiny --prefix $'def area(r):\\n    ' \\
    --suffix $'\\n    return a\\n'
  megacode generate runs/crystal-tiny --chat plain --prompt "What is a list?" """.rstrip()


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
    add = parser.add_argument
    add("checkpoint", type=Path, help="run folder or checkpoint folder")
    add(
        "--prompt", action="append", default=[], help="text to continue; may be given several times"
    )
    add("--prefix", help="code before the gap to fill (fill-in-the-middle)")
    add("--suffix", help="code after the gap to fill")
    add(
        "--chat",
        nargs="?",
        const="",
        metavar="TEMPLATE",
        help="answer each prompt as a turn of a conversation, or lines of standard input without "
        "--prompt; by the chat template of the run's conversations, else the one beside the "
        f"tokenizer, or by {', '.join(BUILT_IN)}, or a file",
    )
    add("--system", help="with --chat: the system's message")
    add("--tokens", type=at_least(1), default=64, help="how many to write at most")
    add("--temperature", type=at_least(0, float), default=0.0, help="0: take the likeliest token")
    add(
        "--top-k", type=at_least(0), default=0, help="draw from the k likeliest tokens; 0: from all"
    )
    add("--top-p", type=fraction, default=1.0, help="draw from the likeliest of this probability")
    add("--seed", type=int, default=0, help="of the draw")


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
    learned = recipe.model.position_embedding == "learned"
    positions = recipe.model.context_length or max(phase.sequence_length for phase in recipe.phases)
    for prompt in prompts:
        if not prompt.tokens:
            raise UserError(
                "--prompt: is empty and the tokenizer's recipe has no begin-of-sequence token "
                "to start from"
            )
        # The last token that is written is not read.
        if learned and len(prompt.tokens) + args.tokens - 1 > positions:
            raise UserError(
                f"--tokens {args.tokens}: with the {len(prompt.tokens):,} of the prompt these are "
                f"more than the {positions:,} positions that the model has learned; "
                "give a smaller number, or a shorter prompt"
            )
    return prompts


def run(args: argparse.Namespace) -> int:
    fills = args.prefix is not None or args.suffix is not None
    if not args.prompt and not fills and args.chat is None:
        raise UserError("give --prompt TEXT (or --prefix and --suffix to fill a gap, or --chat)")
    if args.chat is not None and fills:
        raise UserError("--chat: answers prompts; leave --prefix and --suffix out")
    from rich.console import Console
    from rich.text import Text

    from megacode.evaluate.generate import Sampling, write_on
    from megacode.megatron.distributed import shutdown
    from megacode.megatron.inference import open_for_inference

    recipe, tokenizer, model = open_for_inference(args.checkpoint)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if args.chat is not None:
            chat(args, model, recipe, tokenizer, sampling)
            return 0
        for prompt in prompts_of(args, recipe, tokenizer):
            text = write_on(
                model, recipe, tokenizer, prompt.tokens, args.tokens, sampling, prompt.context
            )
            if console.is_terminal:
                before, after = Text(prompt.before, "dim"), Text(prompt.after, "dim")
                console.print(before + Text(text, "bold") + after)
            else:  # as it is: rich leaves out carriage returns and other control characters
                sys.stdout.write(prompt.before + text + prompt.after + "\n")
    finally:
        shutdown()
    return 0


def chat(args: argparse.Namespace, model: Any, recipe: Any, tokenizer: Any, sampling: Any) -> None:
    """Print the answer to each prompt, or to each line of standard input in one conversation."""
    from megacode.convert.templates import template_of_export
    from megacode.evaluate.generate import answer
    from megacode.tokenizer.chat import load_chat_template
    from megacode.tokenizer.chat_encoding import ChatEncoder

    template, _ = template_of_export(recipe, tokenizer, args.chat or None, "--chat")
    template = template or load_chat_template(tokenizer)  # says that there is none
    encoder = ChatEncoder(tokenizer)
    beginning = [{"role": "system", "content": args.system}] if args.system else []

    def say(messages: list[dict[str, str]]) -> str:
        text = answer(model, template, encoder, messages, args.tokens, sampling)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return text

    if args.prompt:
        for prompt in args.prompt:
            say([*beginning, {"role": "user", "content": prompt}])
        return
    messages = beginning
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        messages = [*messages, {"role": "user", "content": line.rstrip("\n")}]
        messages = [*messages, {"role": "assistant", "content": say(messages)}]
