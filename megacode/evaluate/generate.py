"""Continue tokens with a model: sampling, fill-in-the-middle prompts, text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacode.errors import UserError
from megacode.evaluate.model import LoadedModel
from megacode.megatron.inference import CachedModel, for_inference
from megacode.recipe.schema import Recipe
from megacode.tokenizer.chat import ChatTemplate, Message, TemplateError
from megacode.tokenizer.chat_encoding import ChatEncoder
from megacode.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest at temperature 0, else from top_k and top_p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


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


def continue_tokens(
    model: Any,
    prompt: Sequence[int],
    limit: int,
    stop: Collection[int],
    sampling: Sampling,
    vocab_size: int,
) -> Iterator[int]:
    """Yield up to `limit` tokens after `prompt`, one by one; ends before a token of `stop`.

    On one process. The whole prompt passes once and fills the cache; then one position a step.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    with for_inference([model]):
        cached = CachedModel([model], 1, len(prompt) + limit)
        tokens = list(prompt)
        for _ in range(limit):
            logits = cached.read(torch.tensor([tokens]))
            assert logits is not None
            drawn = next_token(logits[0, :vocab_size].cpu(), sampling, generator)
            if drawn in stop:
                return
            yield drawn
            tokens = [drawn]


def continue_batch(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    sampling: Sampling,
    seeds: Sequence[int],
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Up to `limit` tokens after each prompt, all at once, on the ranks of one pipeline together.

    The first tokens of all prompts, as many as the shortest has, pass at once; then one position a
    step, where a longer prompt goes on with its own tokens. What is written depends on neither the
    other prompts nor the layout, but for rounding.

    Args:
        seeds: of each prompt's generator, where `sampling` has a temperature.
        ended: whether what was written after a prompt, a list that grows, is the end. Equal on all
            ranks.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    position, longest = min(map(len, prompts)), max(map(len, prompts))
    with for_inference(model.chunks):
        cached = CachedModel(model.chunks, len(prompts), longest + limit)
        tokens = torch.tensor([list(prompt[:position]) for prompt in prompts])
        while position < longest + limit and not all(done):
            logits = cached.read(tokens)
            rows = [i for i, p in enumerate(prompts) if position >= len(p) and not done[i]]
            drawn = None
            if logits is not None:
                drawn = torch.zeros(len(prompts), dtype=torch.int64)
                drawn[rows] = _draw(
                    logits[rows, : model.vocab_size], sampling, [generators[i] for i in rows]
                )
            tokens = cached.share(drawn, len(prompts))[:, None]
            for row, prompt in enumerate(prompts):
                if position < len(prompt):
                    tokens[row] = prompt[position]
            for row in rows:
                written[row].append(int(tokens[row]))
                done[row] = ended(written[row]) or len(written[row]) == limit
            position += 1
    return written


def _draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw from `logits`, float `[rows, vocab]`: int64 `[rows]`, on the host."""
    if sampling.temperature <= 0:
        return logits.argmax(-1).cpu()
    rows = zip(logits.cpu(), generators, strict=True)
    drawn = [next_token(row, sampling, generator) for row, generator in rows]
    return torch.tensor(drawn, dtype=torch.int64)


def write_on(
    model: Any,
    recipe: Recipe,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    limit: int,
    sampling: Sampling,
    context: Sequence[int],
) -> str:
    """Text of up to `limit` tokens after `prompt`, as it follows the text of `context`."""
    stop = [tokenizer.eod_id] if recipe.tokenizer and recipe.tokenizer.eod else []
    vocab_size = tokenizer.vocab_size
    written = list(continue_tokens(model, prompt, limit, stop, sampling, vocab_size))
    return continuation(tokenizer, context, written)


def answer(
    model: Any,
    template: ChatTemplate,
    encoder: ChatEncoder,
    messages: Sequence[Message],
    limit: int,
    sampling: Sampling,
) -> str:
    """The assistant's next turn, of up to `limit` tokens; ends at the end of the document or turn.

    Raises:
        UserError: a turn spells a control token, or the template refuses the messages.
    """
    if name := encoder.control_token_in(messages):
        raise UserError(f"a turn spells the control token {name}; write it otherwise")
    try:
        text = template.render(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"{template.origin}: {error}") from None
    tokenizer = encoder.tokenizer
    ends = tokenizer.base.eod_id, tokenizer.control_tokens.get(template.turn_end())
    stop = [token for token in ends if token is not None]
    prompt = encoder.encode(text)[0].tolist()
    return tokenizer.decode(
        list(continue_tokens(model, prompt, limit, stop, sampling, tokenizer.vocab_size))
    )


def infill_prompt(recipe: Any, tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Fill-in-the-middle prompt in prefix-suffix-middle order (arXiv 2207.14255).

    The control tokens are the recipe's.
    """
    fim = recipe.data.fim
    return [
        *([tokenizer.bos_id] if recipe.tokenizer.bos else []),
        tokenizer.token_id(fim.prefix), *tokenizer.encode(prefix),
        tokenizer.token_id(fim.suffix), *tokenizer.encode(suffix),
        tokenizer.token_id(fim.middle),
    ]  # fmt: skip


def continuation(tokenizer: Any, context: Sequence[int], written: Sequence[int]) -> str:
    """Text of `written` where it follows `context`.

    Decoded on its own, tokenizers such as Llama 2's leave its first blank out.
    """
    start, whole = tokenizer.decode(context), tokenizer.decode([*context, *written])
    # Some tokenizers decode the bytes of a whole character otherwise if a broken one follows.
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(written)
