"""One optimizer step: micro-batches through Megatron-Core's schedule, gradients, update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megacode.data.batch import Batch
from megacode.data.packed_row import pack_row, packed_length
from megacode.megatron.distributed import World
from megacode.megatron.hardware import transformer_engine_available
from megacode.megatron.objective import (
    hidden_states,
    pair_gradients,
    pooled_sums,
    pooled_tokens,
    pull,
    weighted_token_loss,
)
from megacode.megatron.workarounds import (
    renew_second_copies,
    slices_of_context_rank,
    without_graphs,
)
from megacode.recipe.objectives import StepObjective
from megacode.recipe.schema import Recipe


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on this rank's device.

    Attributes:
        tokens, labels, position_ids: int64 `[n, S]`.
        loss_mask: float32 `[n, S]`.
        stream: number of each sample's stream, `[n]`.
        positions: how many this rank has, padding of documents not counted.
        mask, packed: document boundaries, in one of two forms (`mask` is bool `[n, 1, S, S]`, True
            where hidden); both None means plain causal. `packed` goes with tensors of one row and
            `sample_tokens`, the tokens of each sample in it.
        members, label_roles: of pairs, see `Batch`.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    stream: Tensor
    positions: int
    mask: Tensor | None
    packed: PackedSeqParams | None
    sample_tokens: tuple[int, ...] | None
    members: Tensor | None = None
    label_roles: Tensor | None = None


def to_device(batch: Batch, world: World, packed_row: int | None = None) -> DeviceBatch:
    """Copy this context-parallel rank's share of a numpy batch to the device.

    Document boundaries are as this machine's attention takes them: Transformer Engine as one packed
    row of documents, the local layers as a mask.

    Args:
        packed_row: tokens of that row, over all context-parallel ranks; default: as few as can be.
    """
    device, size = world.device, world.context_size

    def move(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    arrays = batch.by_token()
    mask = packed = sample_tokens = None
    if batch.segments is not None and transformer_engine_available():
        row = pack_row(batch, packed_row or packed_length(batch, size), size, world.context_rank)
        arrays = {name: getattr(row, name) for name in arrays}
        ends, longest = move(row.edges), int(np.diff(row.edges).max())
        sample_tokens = row.sample_tokens
        # Padding belongs to its document: context parallelism wants to be told so.
        padded = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends} if size > 1 else {}
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            **padded,
        )
    elif batch.segments is not None:
        segments, length = move(batch.segments), batch.segments.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        mask = (later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)
    tensors = {name: move(array) for name, array in arrays.items()}
    if size > 1 and packed is None:
        tensors = slices_of_context_rank(tensors)
    return DeviceBatch(
        **tensors,
        stream=move(batch.stream),
        positions=batch.tokens.size // size,
        mask=mask,
        packed=packed,
        sample_tokens=sample_tokens,
    )


def _packed_row(micro_batches: Sequence[Batch], recipe: Recipe) -> int | None:
    """Tokens of the packed rows of a step's micro-batches, all alike as a pipeline wants them; None
    where they are not packed."""
    if micro_batches[0].segments is None or not transformer_engine_available():
        return None
    parallel = recipe.parallel
    longest = max(packed_length(batch, parallel.context) for batch in micro_batches)
    if parallel.context == 1:
        return longest
    unit = 2 * parallel.context * (parallel.tensor if parallel.sequence else 1)
    unit *= 32 if recipe.precision.compute == "fp8" else 1  # rows of its matrices
    return -(-longest // unit) * unit


_WEIGHT_UNIT = 2**10
"""Weighted tokens are counted in units of at least 1/1024: Megatron-Core adds denominators up as
int32. A power of two leaves gradients exact."""


@dataclass(frozen=True, eq=False)
class _Losses:
    """How losses of tokens become a step's loss."""

    streams: int
    count_positions: bool
    weights: Tensor | None
    """float32 `[streams]`; with them sums and denominators are of weighted tokens."""

    def sums(self, batch: DeviceBatch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked sum of losses of tokens, its denominator, sums by stream (float64
        `[2, streams]`)."""
        masked = losses.float().reshape(batch.loss_mask.shape) * batch.loss_mask
        stream = batch.stream.long()
        with torch.no_grad():
            sums = torch.zeros(2, self.streams, dtype=torch.float64, device=losses.device)
            for row, values in zip(sums, (masked, batch.loss_mask), strict=True):
                row.index_add_(0, stream, _by_sample(batch, values).double())
        if self.weights is None:
            return masked.sum(), self.denominator(batch), sums
        weighted = self.weights[stream] * _by_sample(batch, masked)
        return weighted.sum(), self.denominator(batch), sums

    @torch.no_grad()
    def denominator(self, batch: DeviceBatch) -> Tensor:
        """int32: what this micro-batch adds to the number that gradients are divided by."""
        mask = batch.loss_mask
        if self.weights is None:
            # Filled on the device: the host would wait for a number that it sends.
            count = mask.new_full((), batch.positions) if self.count_positions else mask.sum()
            return count.to(torch.int)
        weight = self.weights[batch.stream.long()]
        each = weight.new_full(weight.shape, batch.positions / len(weight))
        counts = each if self.count_positions else _by_sample(batch, mask)
        return (weight.double() * counts.double()).sum().round().to(torch.int)


def _by_sample(batch: DeviceBatch, values: Tensor) -> Tensor:
    """float32 `[n]`: sums over this rank's tokens of each sample."""
    if batch.sample_tokens and len(set(batch.sample_tokens)) > 1:
        return torch.stack([part.sum() for part in values.reshape(-1).split(batch.sample_tokens)])
    return values.reshape(len(batch.stream), -1).sum(1)


@dataclass(frozen=True, eq=False)
class _PairLosses:
    """The losses of an objective; see `megacode.megatron.objective`.

    Attributes:
        hidden: hidden states of the last forward pass.
        members: of pairs in each micro-batch.
    """

    losses: _Losses
    objective: StepObjective
    hidden: list[Tensor]
    members: Sequence[int]

    def embed(
        self, members: Iterator[int], batch: DeviceBatch, losses: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """First pass: the result of a micro-batch is its `pooled_sums` and denominator."""
        assert batch.members is not None
        pooled = pooled_sums(self.hidden[0], batch.members, next(members))
        count = self.losses.denominator(batch)
        return losses.sum(), count, (pooled, count)

    def sums(
        self, gradients: Iterator[Tensor] | None, batch: DeviceBatch, losses: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_Losses.sums`, with a column for each of the objective's numbers."""
        loss, count, sums = self.losses.sums(batch, losses)
        loss = self.objective.next_token * loss
        numbers = sums.new_zeros(2, len(self.objective.numbers))
        if gradients is not None:
            assert batch.members is not None
            loss = loss + pull(self.hidden[0], batch.members, next(gradients))
        weighted = self.objective.weighted_tokens
        if weighted and batch.label_roles is not None:
            own = losses.float().reshape(batch.loss_mask.shape)
            value, weight = weighted_token_loss(own, batch.label_roles, weighted)
            loss = loss + self.objective.weighted_tokens_weight * value
            numbers[:, -1] = torch.stack([value.detach(), weight])
        return loss, count, torch.cat([sums, numbers], 1)


def _forward(
    loss_of: Callable[[DeviceBatch, Tensor], Any],
    world: World,
    packed_row: int | None,
    iterator: Iterator[Batch],
    model: Any,
) -> Any:
    batch = to_device(next(iterator), world, packed_row)
    losses = model(
        batch.tokens,
        batch.position_ids,
        batch.mask,
        labels=batch.labels,
        packed_seq_params=batch.packed,
    )
    return losses, partial(loss_of, batch)


def forward_backward(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    streams: int,
    recipe: Recipe,
    world: World,
    forward_only: bool = False,
    loss_weights: Sequence[float] | None = None,
    objective: StepObjective | None = None,
) -> Tensor:
    """Run one rank's micro-batches through the pipeline schedule.

    Args:
        loss_weights: of the streams. Gradients are those of sum(weight x loss) / sum(weight) over
            all tokens of the step.
        objective: None: the next-token loss alone.

    Returns:
        float64 `[2, streams + numbers]` on the device: this rank's sums of loss and of loss-bearing
        tokens by stream, then of each of the objective's numbers a sum and what to divide it by;
        zeros where this rank does not see the loss (not the last stage).
    """
    packed_row = _packed_row(micro_batches, recipe)
    count_positions = recipe.optimizer.loss_denominator == "positions"
    weights = None
    if loss_weights is not None:
        most = max(loss_weights) * micro_batches[0].tokens.size * len(micro_batches)
        unit = 2.0 ** math.floor(30 - math.log2(max(most * world.data_size, 1)))
        weights = torch.tensor(loss_weights, dtype=torch.float32, device=world.device)
        weights *= min(_WEIGHT_UNIT, unit)
    losses = _Losses(streams, count_positions, weights)
    if objective:
        return _forward_backward_pairs(
            model_chunks, micro_batches, losses, objective, world, packed_row, forward_only
        )
    forward = partial(_forward, losses.sums, world, packed_row)
    results = run_schedule(model_chunks, micro_batches, forward, packed_row, forward_only)
    if not results:
        return torch.zeros(2, streams, dtype=torch.float64, device=world.device)
    return torch.stack(results).sum(0)


def _forward_backward_pairs(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    losses: _Losses,
    objective: StepObjective,
    world: World,
    packed_row: int | None,
    forward_only: bool,
) -> Tensor:
    """`forward_backward` of an objective: a pass for its embeddings, if it has some, before."""
    how, gradients, found = objective.contrastive, None, None
    if how:
        micro_batches = [replace(b, members=pooled_tokens(b, how)) for b in micro_batches]
    members = [0 if batch.roles is None else len(batch.roles) for batch in micro_batches]
    with hidden_states(model_chunks, how.layer if how else "last") as hidden:
        pairs = _PairLosses(losses, objective, hidden, members)
        if how:
            forward = partial(_forward, partial(pairs.embed, iter(members)), world, packed_row)
            with torch.no_grad():
                embedded = run_schedule(model_chunks, micro_batches, forward, packed_row)
            if embedded:
                split = get_model_config(model_chunks[0]).sequence_parallel
                sums = [one for one, _ in embedded]
                found = pair_gradients(sums, micro_batches, how, split)
                scale = objective.contrastive_weight * _over_ranks(n for _, n in embedded)
                gradients = iter([scale * one for one in found.by_micro_batch])
        forward = partial(_forward, partial(pairs.sums, gradients), world, packed_row)
        results = run_schedule(model_chunks, micro_batches, forward, packed_row, forward_only)
    if not results:
        width = losses.streams + len(objective.numbers)
        return torch.zeros(2, width, dtype=torch.float64, device=world.device)
    total: Tensor = torch.stack(results).sum(0)
    if found:
        total[:, losses.streams : losses.streams + 2] = found.numbers
    return total


def _over_ranks(denominators: Iterable[Tensor]) -> Tensor:
    """float32: what Megatron-Core divides a step's gradients by; it leaves them where it is 0."""
    total = torch.stack(list(denominators)).sum()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    return total.clamp_min(1).float()


def run_schedule(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    forward: Callable[[Iterator[Batch], Any], Any],
    packed_row: int | None = None,
    forward_only: bool = True,
) -> list[Any]:
    """What `forward` gives of each micro-batch, on the last stage; micro-batches have one shape.

    Args:
        forward: Megatron-Core's `forward_step_func`.
        packed_row: tokens of a row, where documents are packed into one.
    """
    rows, length = micro_batches[0].tokens.shape
    with without_graphs(model_chunks) if forward_only else contextlib.nullcontext():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micro_batches) for _ in model_chunks],
            model=list(model_chunks),
            num_microbatches=len(micro_batches),
            seq_length=packed_row or length,
            micro_batch_size=1 if packed_row else rows,
            forward_only=forward_only,
        )
    return results


def prepare_model_for_training(model_chunks: Sequence[Any], optimizer: Any) -> None:
    """Tell Megatron-Core's schedule how to finish gradients, and where communication overlaps."""
    config, ddp_config = model_chunks[0].module.config, model_chunks[0].ddp_config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    def one_or_all(calls: list[Callable[..., Any]]) -> Any:
        return calls if len(calls) > 1 else calls[0]

    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in model_chunks])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in model_chunks])


@contextlib.contextmanager
def gathered_weights(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, every rank has the weights that the last update made. Collective.

    Where the distributed optimizer's gather overlaps with the next forward, a rank has only its own
    share up to date until then: who reads weights in another way than by a training step (a
    checkpoint, an evaluation) does it in here.
    """
    late = [chunk for chunk in model_chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in late:
        chunk.disable_forward_pre_hook(param_sync=True)
        renew_second_copies(chunk)
    try:
        yield
    finally:
        for chunk in late:
            chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def without_fp8(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the layers' matrix products are done in bf16.

    Megatron-Core asks its configuration at every forward.
    """
    configs = [get_model_config(chunk) for chunk in model_chunks]
    before = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, before, strict=True):
            config.fp8 = fp8


def train_step(
    model_chunks: Sequence[Any],
    optimizer: Any,
    micro_batches: Sequence[Batch],
    streams: int,
    recipe: Recipe,
    world: World,
    loss_weights: Sequence[float] | None = None,
    objective: StepObjective | None = None,
) -> tuple[Tensor, float | None]:
    """Forward, backward, clip, update. Rates are set beforehand (`optimizer.set_lr`).

    Returns:
        (sums as of `forward_backward`, global gradient norm before clipping: the same on all
        ranks). The norm is None where Megatron-Core left the update out: with a `loss_scale` it
        does so when a gradient is not finite.
    """
    for chunk in model_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(
        model_chunks,
        micro_batches,
        streams,
        recipe,
        world,
        loss_weights=loss_weights,
        objective=objective,
    )
    _, norm, _ = optimizer.step()
    return sums, None if norm is None else float(norm)
