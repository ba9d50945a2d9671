"""One optimizer step: micro-batches through Megatron-Core's schedule, gradients, update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megacode.data.batch import Batch
from megacode.megatron.distributed import World
from megacode.megatron.hardware import transformer_engine_available
from megacode.megatron.workarounds import (
    renew_second_copies,
    slices_of_context_rank,
    without_graphs,
)
from megacode.recipe.schema import Recipe


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on this rank's device.

    Attributes:
        tokens, labels, position_ids: int64 `[n, S]`.
        loss_mask: float32 `[n, S]`.
        stream: number of each sample's stream, `[n]`.
        mask, packed: document boundaries, in one of two forms (`mask` is bool `[n, 1, S, S]`, True
            where hidden); both None means plain causal.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    stream: Tensor
    mask: Tensor | None
    packed: PackedSeqParams | None


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a numpy batch to the device, with document boundaries as this machine's attention takes
    them: Transformer Engine as one packed row of sequences, the local layers as a mask."""

    def move(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    arrays: list[Any] = [batch.tokens, batch.labels, batch.loss_mask, batch.position_ids]
    mask = packed = None
    if batch.segments is not None and transformer_engine_available():
        arrays = [array.reshape(1, -1) for array in arrays]
        starts = np.ones(batch.segments.shape, dtype=bool)
        starts[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
        edges = np.append(np.flatnonzero(starts), batch.segments.size).astype(np.int32)
        ends, longest = move(edges), int(np.diff(edges).max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    elif batch.segments is not None:
        segments, length = move(batch.segments), batch.segments.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        mask = (later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)
    tokens, labels, loss_mask, position_ids = map(move, arrays)
    stream = move(batch.stream)
    return DeviceBatch(tokens, labels, loss_mask, position_ids, stream, mask, packed)


def this_context_rank(batch: DeviceBatch, world: World) -> DeviceBatch:
    """This context-parallel rank's two slices of every sequence.

    The first and last of 2 x size slices are paired, the second and the one before the last, and so
    on, so that every rank has the same causal work. Document boundaries do not go with it;
    `megacode.recipe.checks` refuses them.
    """
    if world.context_size == 1:
        return batch
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return replace(batch, **slices_of_context_rank({name: getattr(batch, name) for name in names}))


def _loss(
    batch: DeviceBatch, streams: int, count_positions: bool, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked sum of losses (`[n, S]`), its denominator, sums by stream (float64 `[2, streams]`)."""
    losses = losses.float().reshape(batch.loss_mask.shape)
    masked = losses * batch.loss_mask
    with torch.no_grad():
        rows, stream = batch.stream.shape[0], batch.stream.long()
        sums = torch.zeros(2, streams, dtype=torch.float64, device=losses.device)
        for row, values in zip(sums, (masked, batch.loss_mask), strict=True):
            row.index_add_(0, stream, values.reshape(rows, -1).sum(1).double())
        mask = batch.loss_mask
        # Filled on the device: the host would wait for a number that it sends.
        count = mask.new_full((), mask.numel()) if count_positions else mask.sum()
    return masked.sum(), count.to(torch.int), sums


def _forward(
    streams: int, count_positions: bool, world: World, iterator: Iterator[Batch], model: Any
) -> Any:
    batch = this_context_rank(to_device(next(iterator), world.device), world)
    losses = model(
        batch.tokens,
        batch.position_ids,
        batch.mask,
        labels=batch.labels,
        packed_seq_params=batch.packed,
    )
    return losses, partial(_loss, batch, streams, count_positions)


def forward_backward(
    model_chunks: Sequence[Any],
    micro_batches: Sequence[Batch],
    streams: int,
    recipe: Recipe,
    world: World,
    forward_only: bool = False,
) -> Tensor:
    """Run one rank's micro-batches through the pipeline schedule.

    Returns:
        float64 `[2, streams]` on the device: this rank's sums of loss and of loss-bearing tokens by
        stream; zeros where this rank does not see the loss (not the last stage).
    """
    rows, length = micro_batches[0].tokens.shape
    packed = micro_batches[0].segments is not None and transformer_engine_available()
    count_positions = recipe.optimizer.loss_denominator == "positions"
    with without_graphs(model_chunks) if forward_only else contextlib.nullcontext():
        results = get_forward_backward_func()(
            forward_step_func=partial(_forward, streams, count_positions, world),
            data_iterator=[iter(micro_batches) for _ in model_chunks],
            model=list(model_chunks),
            num_microbatches=len(micro_batches),
            seq_length=rows * length if packed else length,
            micro_batch_size=1 if packed else rows,
            forward_only=forward_only,
        )
    if not results:
        return torch.zeros(2, streams, dtype=torch.float64, device=world.device)
    return torch.stack(results).sum(0)


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
    configs = [chunk.module.config for chunk in model_chunks]
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
    sums = forward_backward(model_chunks, micro_batches, streams, recipe, world)
    _, norm, _ = optimizer.step()
    return sums, None if norm is None else float(norm)
