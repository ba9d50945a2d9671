"""Log-likelihoods and embeddings of tokens through Megatron-Core's schedule, in any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_model_config
from torch import Tensor

from megacode.data.batch import Batch
from megacode.megatron.distributed import World
from megacode.megatron.objective import hidden_states, pooled_sums, pooled_tokens
from megacode.megatron.step import DeviceBatch, run_schedule, to_device
from megacode.recipe.schema import Contrastive


@torch.no_grad()
def score_tokens(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    texts: int,
    vocab_size: int,
    world: World,
) -> Tensor:
    """Score the labels where `loss_mask` is 1; sums by text, whose number is the sample's `stream`.

    The micro-batches have one shape. Rows of the vocabulary from `vocab_size` on are no tokens and
    have no probability. `megatron.step.gathered_weights` holds around it.

    Returns:
        float64 `[2, texts]` on the device: this rank's sums of negative log-likelihoods (nats), and
        of labels that were not the likeliest. Zeros where this rank does not see the loss.
    """
    forward = partial(_forward, texts, vocab_size, world)
    results = run_schedule(model_chunks, micro_batches, forward)
    if not results:
        return torch.zeros(2, texts, dtype=torch.float64, device=world.device)
    return torch.stack(results).sum(0)


@torch.no_grad()
def embed_tokens(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    texts: int,
    how: Contrastive,
    world: World,
) -> Tensor:
    """Sums of hidden states over the pooled tokens of each text, whose number from 1 is the batch's
    `members`.

    Returns:
        float32 `[texts, hidden]` on the device; the sum over all ranks is that of the texts.
    """
    split = get_model_config(model_chunks[0]).sequence_parallel
    micro_batches = [replace(batch, members=pooled_tokens(batch, how)) for batch in micro_batches]
    with hidden_states(model_chunks, how.layer) as hidden:

        def pool(batch: DeviceBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert batch.members is not None
            sums = pooled_sums(hidden[0], batch.members, texts)
            return output.sum(), batch.loss_mask.sum().to(torch.int), sums

        def forward(iterator: Iterator[Batch], model: Any) -> Any:
            batch = to_device(next(iterator), world)
            output = model(batch.tokens, batch.position_ids, batch.mask, labels=batch.labels)
            return output, partial(pool, batch)

        results = run_schedule(model_chunks, micro_batches, forward)
    if not results or (world.tensor_rank and not split):
        width = get_model_config(model_chunks[0]).hidden_size
        return torch.zeros(texts, width, device=world.device)
    return torch.stack(results).sum(0)


def _forward(
    texts: int, vocab_size: int, world: World, iterator: Iterator[Batch], model: Any
) -> Any:
    batch = to_device(next(iterator), world)
    logits = model(batch.tokens, batch.position_ids, batch.mask)
    return logits, partial(_score, batch, texts, vocab_size, world)


def _score(
    batch: DeviceBatch, texts: int, vocab_size: int, world: World, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As Megatron-Core's schedule takes it: (loss, its denominator, what is asked for).

    Args:
        logits: `[n, S, vocab / tensor ranks]`, this rank's part.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.float()
    part = logits.shape[-1]
    first = world.tensor_rank * part
    logits[..., max(vocab_size - first, 0) :] = float("-inf")
    best = logits.amax(-1)
    torch.distributed.all_reduce(best, torch.distributed.ReduceOp.MAX, group)
    own = batch.labels - first
    given = logits.gather(-1, own.clamp(0, part - 1)[..., None])[..., 0]
    given = given.masked_fill((own < 0) | (own >= part), float("-inf"))
    torch.distributed.all_reduce(given, torch.distributed.ReduceOp.MAX, group)
    by_position = [one.transpose(0, 1).contiguous() for one in (logits, batch.labels)]
    losses = vocab_parallel_cross_entropy(*by_position).transpose(0, 1)
    sums = torch.zeros(2, texts, dtype=torch.float64, device=logits.device)
    both = torch.stack([losses, (given < best).float()])
    scored = torch.where(batch.loss_mask > 0, both, 0.0).double()
    sums.index_add_(1, batch.stream.long(), scored.sum(2))
    return losses.sum(), batch.loss_mask.sum().to(torch.int), sums
