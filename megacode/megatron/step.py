"""One optimizer step: micro-batches through Megatron-Core's schedule, gradients, update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megacode.data.batch import Batch
from megacode.megatron.distributed import World
from megacode.megatron.hardware import transformer_engine_available
from megacode.recipe.schema import Recipe


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch on this rank's device: int64 `[n, S]` tokens, labels and positions, float32 `[n, S]` loss mask.

    `mask` (bool `[n, 1, S, S]`, True = hidden) or `packed` carry document boundaries; both None means plain causal.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    stream: Tensor
    mask: Tensor | None
    packed: PackedSeqParams | None


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a numpy batch to the device, with document boundaries in the form this machine's attention takes."""

    def move(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    mask = packed = None
    tokens, labels = move(batch.tokens), move(batch.labels)
    loss_mask, positions = move(batch.loss_mask), move(batch.position_ids)
    if batch.segments is not None:
        segments = move(batch.segments)
        if transformer_engine_available():
            # Transformer Engine takes documents as one packed row of variable-length sequences.
            packed = _packed(batch.segments, device)
            tokens, labels, loss_mask, positions = (
                t.reshape(1, -1) for t in (tokens, labels, loss_mask, positions)
            )
        else:
            length = segments.shape[1]
            later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
            mask = (later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)
    return DeviceBatch(tokens, labels, loss_mask, positions, move(batch.stream), mask, packed)


def _packed(segments: Any, device: torch.device) -> PackedSeqParams:
    """Boundaries of a micro-batch laid out as one row: cumulative lengths of its documents."""
    import numpy as np

    starts = np.ones(segments.shape, dtype=bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    edges = np.append(np.flatnonzero(starts.reshape(-1)), segments.size).astype(np.int32)
    lengths = torch.from_numpy(edges)
    if device.type == "cuda":
        lengths = lengths.pin_memory().to(device, non_blocking=True)
    longest = int(np.diff(edges).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def this_context_rank(batch: DeviceBatch, world: World) -> DeviceBatch:
    """This context-parallel rank's two slices of every sequence (the first and last of 2 x size are paired, so that
    every rank has the same causal work). Without context parallelism: the batch itself.

    Document boundaries do not go with it; `megacode.recipe.checks` refuses them.
    """
    if world.context_size == 1:
        return batch
    from megatron.core.utils import get_batch_on_this_cp_rank

    # Megatron-Core 0.19 wants to be told that ranks do not change their part with the sequence.
    newer = (
        {"is_hybrid_cp": False}
        if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters
        else {}
    )
    cut = get_batch_on_this_cp_rank(
        {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "loss_mask": batch.loss_mask,
            "position_ids": batch.positions,
        },
        **newer,
    )
    return DeviceBatch(
        cut["tokens"],
        cut["labels"],
        cut["loss_mask"],
        cut["position_ids"],
        batch.stream,
        mask=None,
        packed=None,
    )


def _loss(
    batch: DeviceBatch, streams: int, count_positions: bool, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked sum of per-token losses (`[n, S]`), its denominator, and sums by stream: float64 `[2, streams]`."""
    losses = losses.float().reshape(batch.loss_mask.shape)
    masked = losses * batch.loss_mask
    with torch.no_grad():
        rows = batch.stream.shape[0]
        sums = torch.zeros(2, streams, dtype=torch.float64, device=losses.device)
        sums[0].index_add_(0, batch.stream.long(), masked.reshape(rows, -1).sum(1).double())
        sums[1].index_add_(
            0, batch.stream.long(), batch.loss_mask.reshape(rows, -1).sum(1).double()
        )
        mask = (
            batch.loss_mask
        )  # filled on the device: a number that comes from the host would make it wait
        count = mask.new_full((), mask.numel()) if count_positions else mask.sum()
    return masked.sum(), count.to(torch.int), sums


def _forward(
    streams: int, count_positions: bool, world: World, iterator: Iterator[Batch], model: Any
) -> Any:
    batch = this_context_rank(to_device(next(iterator), world.device), world)
    losses = model(
        batch.tokens,
        batch.positions,
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
        float64 `[2, streams]` on the device: this rank's sums of loss and of loss-bearing tokens by stream; zeros where
        this rank does not see the loss (not the last stage).
    """
    rows, length = micro_batches[0].tokens.shape
    packed = micro_batches[0].segments is not None and transformer_engine_available()
    with _without_graphs(model_chunks) if forward_only else contextlib.nullcontext():
        results = get_forward_backward_func()(
            forward_step_func=partial(
                _forward, streams, recipe.optimizer.loss_denominator == "positions", world
            ),
            data_iterator=[iter(micro_batches) for _ in model_chunks]
            if len(model_chunks) > 1
            else iter(micro_batches),
            model=list(model_chunks) if len(model_chunks) > 1 else model_chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=rows * length if packed else length,
            micro_batch_size=1 if packed else rows,
            forward_only=forward_only,
        )
    if not results:
        return torch.zeros(2, streams, dtype=torch.float64, device=world.device)
    return torch.stack(results).sum(0)


@contextlib.contextmanager
def _without_graphs(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, layers run as they are written: what was recorded as CUDA graphs has training's shapes and precision, and
    Megatron-Core would end the run at any other."""
    held = [
        (module, module._modules.pop("cudagraph_manager"))
        for chunk in model_chunks
        for module in chunk.modules()
        if "cudagraph_manager" in module._modules
    ]
    try:
        yield
    finally:
        for module, manager in held:
            module._modules["cudagraph_manager"] = manager


def prepare_model_for_training(model_chunks: Sequence[Any], optimizer: Any) -> None:
    """Tell Megatron-Core's schedule how to finish gradients and, where gradients are reduced during backward, when not to."""
    config = model_chunks[0].module.config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if model_chunks[0].ddp_config.overlap_grad_reduce:
        hooks: list[Callable[..., Any]] = [chunk.no_sync for chunk in model_chunks]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    if (
        model_chunks[0].ddp_config.overlap_param_gather
        and model_chunks[0].ddp_config.align_param_gather
    ):
        syncs = [chunk.start_param_sync for chunk in model_chunks]
        config.param_sync_func = syncs if len(syncs) > 1 else syncs[0]


@contextlib.contextmanager
def gathered_weights(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, every rank has the weights that the last update made. Collective.

    Where the distributed optimizer's gather overlaps with the next forward, a rank has only its own share up to date until
    then: who reads weights in another way than by a training step (a checkpoint, an evaluation) does it in here.
    """
    late = [chunk for chunk in model_chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in late:
        chunk.disable_forward_pre_hook(param_sync=True)
        # FP8 weights have a second copy, for the backward pass. Megatron-Core makes it anew after a gather, but not after this
        # one (0.16): the next step's gradients would be those of older weights.
        in_fp8 = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
        if in_fp8:
            post_all_gather_processing(in_fp8)
    try:
        yield
    finally:
        for chunk in late:
            chunk.enable_forward_pre_hook()


@contextlib.contextmanager
def without_fp8(model_chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the layers' matrix products are done in bf16: Megatron-Core asks its configuration at every forward."""
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
        (sums as of `forward_backward`, global gradient norm before clipping: the same on all ranks). The norm is None where
        Megatron-Core left the update out: with a `loss_scale` it does so when a gradient is not finite.
    """
    for chunk in model_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(model_chunks, micro_batches, streams, recipe, world)
    _, norm, _ = optimizer.step()
    return sums, None if norm is None else float(norm)
