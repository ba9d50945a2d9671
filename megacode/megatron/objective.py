"""Losses of pairs of code beside the next-token loss (`phases.*.objective`).

The contrastive loss of a step is one number of all its embeddings, which micro-batches and ranks
share. Its gradient is found in two passes (GradCache, arXiv 2101.06983):

1. The step's micro-batches run forward. `pair_gradients` gathers the embeddings of all ranks and
   takes the gradient of the loss by each of this rank's embeddings.
2. In the training pass, `pull` of a micro-batch is the inner product of its embeddings with these
   gradients. Its gradient by the weights is that of the loss.

An embedding is a mean of hidden states, so `pull` is a sum over tokens: ranks that share a
sequence (tensor parallelism with `parallel.sequence`, context parallelism) add up their own tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from numpy.typing import NDArray
from torch import Tensor

from megacode.data.batch import Batch
from megacode.data.loss_marks import EQUIVALENT, MARKS, OTHER, QUERY
from megacode.recipe.schema import Contrastive, WeightedTokens


@dataclass(frozen=True, eq=False)
class PairGradients:
    """Of a step's contrastive loss, on the last pipeline stage.

    Attributes:
        by_micro_batch: float32 `[members, hidden]`, by the sums of hidden states over each member's
            pooled tokens.
        numbers: float64 `[2, 2]`: the loss, and the share of queries whose nearest candidate is
            equivalent; below each 1, or 0 where the step has no pairs to compare.
    """

    by_micro_batch: list[Tensor]
    numbers: Tensor


def pooled_tokens(batch: Batch, how: Contrastive) -> NDArray[np.int32]:
    """int32 `[n, S]`: the member that each token is pooled into (from 1), 0 of none."""
    members = batch.members
    if members is None:
        return np.zeros(batch.tokens.shape, dtype=np.int32)
    if how.pooling == "mean":
        return members
    after = np.zeros_like(members)
    after[:, :-1] = members[:, 1:]
    return np.where(members != after, members, np.int32(0))


@contextlib.contextmanager
def hidden_states(model_chunks: Sequence[Any], layer: int | str) -> Iterator[list[Tensor]]:
    """Inside, the list holds what the last forward pass has after `layer` (from 1, or `last`: after
    the final norm), on the last pipeline stage: `[S, n, hidden]`, this rank's share of tokens."""
    found: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        found[:] = [output[0] if isinstance(output, tuple) else output]

    handle = None
    if get_attr_wrapped_model(model_chunks[-1], "post_process"):
        module = get_attr_wrapped_model(model_chunks[-1], "decoder")
        if layer != "last":
            module = next(one for one in module.layers if one.layer_number == layer)
        handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        if handle:
            handle.remove()


def pooled_sums(hidden: Tensor, pooled: Tensor, members: int) -> Tensor:
    """float32 `[members, hidden]`: sums over this rank's tokens.

    Args:
        hidden: `[S, n, hidden]`, this rank's share.
        pooled: int32 `[n, S]`, see `pooled_tokens`; of the sequence before sequence parallelism.
    """
    flat = hidden.float().flatten(0, 1)
    where = _own_tokens(pooled, len(hidden)).reshape(-1)
    return flat.new_zeros(members + 1, flat.shape[1]).index_add(0, where, flat)[1:]


def pull(hidden: Tensor, pooled: Tensor, gradients: Tensor) -> Tensor:
    """Sum over this rank's tokens of hidden state x the gradient of its member; see `pooled_sums`.

    Args:
        gradients: float32 `[members, hidden]`.
    """
    padded = torch.cat([gradients.new_zeros(1, gradients.shape[1]), gradients])
    return (hidden.float() * padded[_own_tokens(pooled, len(hidden))]).sum()


def _own_tokens(pooled: Tensor, length: int) -> Tensor:
    """int64 `[length, n]`: the part of the sequence that this tensor-parallel rank has."""
    by_position = pooled.transpose(0, 1).long()
    if len(by_position) == length:
        return by_position
    first = parallel_state.get_tensor_model_parallel_rank() * length
    return by_position[first : first + length]


def pair_gradients(
    sums: Sequence[Tensor], micro_batches: Sequence[Batch], how: Contrastive, split: bool
) -> PairGradients:
    """Collective over the ranks of the last pipeline stage.

    Args:
        sums: `pooled_sums` of each micro-batch.
        micro_batches: with `pooled_tokens` as their members.
        split: whether tensor-parallel ranks have a part of the sequence each.
    """
    own = torch.cat(list(sums))
    for group, shared in (
        (parallel_state.get_context_parallel_group(), True),
        (parallel_state.get_tensor_model_parallel_group(), split),
    ):
        if shared and group.size() > 1:
            torch.distributed.all_reduce(own, group=group)
    members, device = [len(one) for one in sums], own.device
    counts = np.concatenate(
        [np.bincount(b.members.reshape(-1), minlength=n + 1)[1:]  # type: ignore[union-attr]
         for b, n in zip(micro_batches, members, strict=True)]
    )  # fmt: skip
    own /= torch.from_numpy(counts).to(device, torch.float32)[:, None]
    none = np.zeros(0, dtype=np.uint8)
    roles = np.concatenate([none if b.roles is None else b.roles for b in micro_batches])
    embeddings, roles_of_all, pairs, rows = _gathered(own, torch.from_numpy(roles).to(own))
    with torch.enable_grad():
        found = contrastive_loss(embeddings.requires_grad_(), roles_of_all, pairs, how)
        loss, accuracy = found or (embeddings.sum() * 0.0, embeddings.new_zeros(()))
        (gradient,) = torch.autograd.grad(loss, embeddings)
    by_sums = gradient[rows] / torch.from_numpy(counts).to(gradient)[:, None]
    numbers = torch.stack([loss.detach(), accuracy]).double()
    counts_of = torch.full_like(numbers, float(found is not None))
    return PairGradients(list(by_sums.split(members)), torch.stack([numbers, counts_of]))


def _gathered(own: Tensor, roles: Tensor) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Embeddings, roles and numbers of pairs of all data-parallel ranks, and which are this one's.
    Ranks are padded to as many members; the role of padding is 0."""
    group = parallel_state.get_data_parallel_group()
    most = torch.tensor([len(own)], device=own.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
    size, width = int(most), own.shape[1]
    padded = own.new_zeros(size, width + 2)
    padded[: len(own), :width] = own
    padded[: len(own), width] = roles
    padded[: len(own), width + 1] = (roles == QUERY).cumsum(0)
    parts = [torch.empty_like(padded) for _ in range(group.size())]
    torch.distributed.all_gather(parts, padded, group)
    numbered = [part[:, width + 1].long() + i * (size + 1) for i, part in enumerate(parts)]
    everything = torch.cat(parts)
    first = group.rank() * size
    return (
        everything[:, :width].contiguous(),
        everything[:, width].to(torch.uint8),
        torch.cat(numbered),
        slice(first, first + len(own)),
    )


def contrastive_loss(
    embeddings: Tensor, roles: Tensor, pairs: Tensor, how: Contrastive
) -> tuple[Tensor, Tensor] | None:
    """The loss over all queries, and the share of them whose nearest candidate is equivalent; None
    if no query has an equivalent candidate and a negative.

    Similarity is the cosine. InfoNCE (arXiv 1807.03748) is the mean over (query, equivalent
    candidate) of -log(exp(s / t) / (exp(s / t) + sum over negatives of exp(s' / t))); the triplet
    loss is the mean over (query, equivalent candidate, negative) of max(0, margin + s' - s). A
    query's negatives are its own other candidates and, `in_batch`, all candidates of other pairs.

    Args:
        embeddings: float32 `[members, hidden]`.
        roles: `[members]`, QUERY, EQUIVALENT or OTHER; others (padding) are left out.
        pairs: int64 `[members]`, number of the pair of each.
    """
    unit, queries = F.normalize(embeddings, dim=-1), roles == QUERY
    candidates = (roles == EQUIVALENT) | (roles == OTHER)
    similarity = unit[queries] @ unit[candidates].T
    own = pairs[queries][:, None] == pairs[candidates][None]
    equivalent = own & (roles[candidates] == EQUIVALENT)
    negative = own & (roles[candidates] == OTHER)
    if how.in_batch:
        negative |= ~own
    counted = equivalent.any(1) & negative.any(1)
    if not counted.any():
        return None
    similarity, equivalent, negative = (one[counted] for one in (similarity, equivalent, negative))
    lowest = torch.finfo(similarity.dtype).min
    best = similarity.masked_fill(~equivalent, lowest).amax(1)
    accuracy = (best > similarity.masked_fill(~negative, lowest).amax(1)).float().mean().detach()
    if how.loss == "triplet":
        gaps = how.margin + similarity[:, None, :] - similarity[:, :, None]
        both = equivalent[:, :, None] & negative[:, None, :]
        return gaps.clamp_min(0.0)[both].mean(), accuracy
    logits = similarity / how.temperature
    away = logits.masked_fill(~negative, lowest).logsumexp(1, keepdim=True)
    return F.softplus(away - logits)[equivalent].mean(), accuracy


def weighted_token_loss(
    losses: Tensor, label_roles: Tensor, how: WeightedTokens
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of weight x loss, and of weights.

    Args:
        losses: float32 `[n, S]`, -log p of each label.
        label_roles: uint8 `[n, S]`; 0 counts nothing.
    """
    table = losses.new_zeros(MARKS)
    for role, weight in ((QUERY, how.query), (EQUIVALENT, how.equivalent), (OTHER, how.other)):
        table[role] = weight
    weights = table[label_roles.long()]
    # -log(1 - p); near p = 1 the loss of a token is bounded.
    unlikely = -torch.log(-torch.expm1(-losses.clamp_min(1e-6)))
    return (weights * torch.where(label_roles == OTHER, unlikely, losses)).sum(), weights.sum()
