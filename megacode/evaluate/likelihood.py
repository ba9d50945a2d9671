"""Log-likelihoods of texts after contexts, by the model as it lies on the ranks.

Texts become tokens by the rules of lm-evaluation-harness, so that numbers can be compared: blanks
at a context's end go to the text; the text's tokens are those of both together after the context's
own; a context that is empty is one token, BOS or else end-of-document; what is too long loses its
beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megacode.data.batch import Batch
from megacode.evaluate.model import LoadedModel
from megacode.megatron.scoring import score_tokens
from megacode.tokenizer.tokenizer import Tokenizer

_AT_ONCE = 32
"""Micro-batches for each pipeline stage that go through the model in one go."""
_LENGTH_UNIT = 16


@dataclass(frozen=True)
class Scored:
    """Log-likelihood in nats, number of scored tokens, and whether each was the likeliest."""

    log_likelihood: float
    tokens: int
    greedy: bool


def encode_pair(
    tokenizer: Tokenizer, bos: bool, context: str, text: str
) -> tuple[list[int], list[int]]:
    """(tokens of the context, tokens of the text after it); `bos` begins a context with BOS."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, text = context[:-blanks], context[-blanks:] + text
    if not context:
        own = tokenizer.base.bos_id
        return [tokenizer.eod_id if own is None else own], list(tokenizer.encode(text))
    start = [tokenizer.bos_id] if bos else []
    before = [*start, *tokenizer.encode(context)]
    return before, [*start, *tokenizer.encode(context + text)][len(before) :]


@torch.no_grad()
def log_likelihoods(
    model: LoadedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Scored]:
    """Score the second tokens of each pair after the first. Collective; equal on every rank.

    Pairs are shared out among data-parallel ranks. A pair that is longer than the model's context
    loses its beginning: first the context's tokens, then those to be scored.
    """
    world = model.world
    windows = [[*context, *text][-(model.context_length + 1) :] for context, text in pairs]
    scored = [min(len(t), len(w) - 1) for (_, t), w in zip(pairs, windows, strict=True)]
    totals = torch.zeros(2, len(pairs), dtype=torch.float64, device=world.device)
    for part in _own_batches(model, windows, scored):
        totals += score_tokens(model.chunks, part, len(pairs), model.vocab_size, world)
    if world.tensor_rank:
        totals.zero_()  # every tensor-parallel rank holds the same sums: one of them speaks
    torch.distributed.all_reduce(totals)
    losses, missed = totals.tolist()
    return [Scored(-loss, n, m == 0) for loss, n, m in zip(losses, scored, missed, strict=True)]


def text_batches(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Iterator[list[Batch]]:
    """Micro-batches of this data-parallel rank's share of texts, of one shape each list. `members`
    has the number of each token's text, from 1."""
    windows = [[*text, 0] for text in texts]  # the label of the last token, which is scored
    for part in _own_batches(model, windows, [1] * len(texts)):
        yield [replace(batch, members=_members(batch, texts)) for batch in part]


def _members(batch: Batch, texts: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    members = np.zeros(batch.tokens.shape, dtype=np.int32)
    for row, number in enumerate(batch.stream.tolist()):
        if batch.loss_mask[row].any():  # a row that fills up a batch has no text
            members[row, : len(texts[number])] = number + 1
    return members


def _own_batches(
    model: LoadedModel, windows: Sequence[Sequence[int]], scored: Sequence[int]
) -> Iterator[list[Batch]]:
    """This data-parallel rank's micro-batches, as many as go through the model in one go."""
    world = model.world
    for batches in _batches(model, windows, scored):
        own = batches[world.data_rank :: world.data_size]
        stages = world.pipeline_size if len(model.chunks) > 1 else 1
        own += [_masked(batches[0])] * (-len(own) % stages or not own)
        some = iter(own)
        while part := list(itertools.islice(some, _AT_ONCE * world.pipeline_size)):
            yield part


def _batches(
    model: LoadedModel, windows: Sequence[Sequence[int]], scored: Sequence[int]
) -> list[list[Batch]]:
    """Micro-batches of one shape each list, with at most the tokens of a training micro-batch."""
    unit = math.lcm(_LENGTH_UNIT, model.length_unit)
    lengths = [-(-max(len(window) - 1, 1) // unit) * unit for window in windows]
    order = sorted(range(len(windows)), key=lambda i: (-lengths[i], i))
    found = []
    for length, group in itertools.groupby(order, key=lambda i: lengths[i]):
        numbers = list(group)
        rows = min(max(1, model.tokens_at_once // length), len(numbers))
        found.append(
            [
                _batch(numbers[i : i + rows], windows, scored, rows, length)
                for i in range(0, len(numbers), rows)
            ]
        )
    return found


def _batch(
    numbers: Sequence[int],
    windows: Sequence[Sequence[int]],
    scored: Sequence[int],
    rows: int,
    length: int,
) -> Batch:
    """One micro-batch `[rows, length]`; `stream` is the pair's number."""
    tokens = np.zeros((rows, length + 1), dtype=np.int64)
    mask = np.zeros((rows, length), dtype=np.float32)
    stream = np.zeros(rows, dtype=np.int32)
    for row, number in enumerate(numbers):
        window = windows[number]
        tokens[row, : len(window)] = window
        mask[row, len(window) - 1 - scored[number] : len(window) - 1] = 1.0
        stream[row] = number
    positions: NDArray[np.int64] = np.broadcast_to(np.arange(length), (rows, length)).copy()
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    return Batch(inputs, labels, mask, positions, stream, None, 0)


def _masked(batch: Batch) -> Batch:
    """A batch of the same shape without scored tokens: pipelines take multiples of their stages."""
    blank = np.zeros_like(batch.loss_mask)
    return Batch(
        batch.tokens, batch.labels, blank, batch.position_ids, batch.stream, batch.segments, 0
    )
