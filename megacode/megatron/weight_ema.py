"""The exponential moving average (EMA) of weights: each rank averages the masters that it updates.

With the distributed optimizer these are a rank's shard, flat pieces of parameters; without it, all
of its parameters. In checkpoints the averages have the shapes and the places of the weights, so any
layout loads them.

Megatron-Core's distributed optimizer saves and loads masters and two moments by their names, and no
other state (megatron/core/optimizer/distrib_optimizer.py, `get_parameter_state_dp_zero`). So the
averages stand beside the optimizer, and are gathered here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megacode.megatron.checkpoint_index import EMA
from megacode.megatron.optimizer_state import inner_optimizers, join, optimizer_parts
from megacode.recipe.schema import Ema

_GATHERED = 2**24
"""Numbers gathered on the device at once."""


@dataclass(frozen=True)
class _Shard:
    """Numbers `start` to `end` of a flattened parameter, which this rank updates.

    Attributes:
        master: gives them in fp32.
    """

    parameter: Tensor
    start: int
    end: int
    master: Callable[[], Tensor]


class WeightEma:
    """average = decay x average + (1 - decay) x master, for every step.

    On CUDA the update runs on a stream of its own beside the next forward and backward; the
    optimizer's next update waits for it.
    """

    def __init__(self, settings: Ema, optimizer: Any, model_chunks: Sequence[Any]) -> None:
        self._settings, self._parts = settings, []
        self._parameters = [p for chunk in model_chunks for p in chunk.parameters()]
        if model_chunks[0].ddp_config.use_distributed_optimizer:
            self._parts = [part for part in optimizer_parts(optimizer) if part.optimizer]
            self._shards = [shard for part in self._parts for shard in _owned(part)]
        else:
            self._shards = [
                _Shard(p, 0, p.numel(), partial(_whole_master, p)) for p in self._parameters
            ]
        self._made = any(part.config.use_precision_aware_optimizer for part in self._parts)
        self._averages = [
            torch.empty(one.end - one.start, dtype=torch.float32, device=one.parameter.device)
            for one in self._shards
        ]
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        for adam in inner_optimizers(optimizer):
            adam.register_step_pre_hook(lambda *_: self._wait())

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        for average, shard in zip(self._averages, self._shards, strict=True):
            average.copy_(shard.master())

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after `done` steps, where these are a multiple of `every`."""
        if done % self._settings.every:
            return
        new = 1 - self._settings.decay**self._settings.every
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # does nothing for None
            if self._made:  # masters are put together for the moment: one at a time
                for average, shard in zip(self._averages, self._shards, strict=True):
                    average.lerp_(shard.master(), new)
            elif self._shards:
                masters = [shard.master() for shard in self._shards]
                torch._foreach_lerp_(self._averages, masters, new)

    def _wait(self) -> None:
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)

    # --------------------------------------------------------------------------------- checkpoints

    def sharded_state(self, model_state: Any, loading: bool) -> dict[int, Any]:
        """The averages as Megatron-Core's sharded tensors, by number. Collective unless `loading`.

        Args:
            model_state: sharded state of the model chunks.
            loading: tensors to load into, without numbers; else on the host, gathered.
        """
        self._wait()
        places = {
            id(one.data): one
            for one in nested_values(model_state)
            if isinstance(one, ShardedTensor | ShardedTensorFactory)
        }
        if loading:
            whole = iter([(p, torch.empty(p.shape)) for p in self._parameters])
        else:
            whole = self._whole()
        return {
            number: make_sharded_optimizer_tensor(places[id(p)], average, EMA.rstrip("."))
            for number, (p, average) in enumerate(whole)
        }

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its average on the host) of all parameters of this rank's model chunks."""
        of_shard = zip(self._shards, self._averages, strict=True)
        if not self._parts:
            for shard, average in of_shard:
                yield shard.parameter, average.view(shard.parameter.shape).to("cpu", copy=True)
            return
        averages = {id(shard.parameter): average for shard, average in of_shard}
        for part in self._parts:
            for buffer, by_type in zip(part.buffers, part.gbuf_ranges, strict=True):
                (ranges,) = by_type.values()
                for bucket, mine in zip(buffer.buckets, ranges, strict=True):
                    group = part.data_parallel_group
                    flat = torch.zeros(bucket.grad_data.numel() // group.size())
                    for parameter, places in mine["param_map"].items():
                        place = places["gbuf_local"]
                        flat[place.start : place.end] = averages[id(parameter)]
                    flat = _gathered(flat, group, bucket.grad_data.device)
                    for parameter in bucket.params_list:
                        start, end, _ = buffer.param_index_map[parameter]
                        numbers = flat[start - bucket.offset : end - bucket.offset]
                        yield parameter, numbers.view(parameter.shape)

    @torch.no_grad()
    def load(self, loaded: dict[int, Tensor]) -> None:
        """Keep this rank's part of what was loaded into `sharded_state`."""
        whole = {id(parameter): loaded[n] for n, parameter in enumerate(self._parameters)}
        for average, shard in zip(self._averages, self._shards, strict=True):
            average.copy_(whole[id(shard.parameter)].view(-1)[shard.start : shard.end])


def _gathered(flat: Tensor, group: Any, device: torch.device) -> Tensor:
    """float32 `[size x n]`: the `[n]` of every rank of the group, in order, on the host."""
    size = group.size()
    if size == 1:
        return flat
    whole, most = torch.empty(size, len(flat)), max(_GATHERED // size, 1)
    for start in range(0, len(flat), most):
        mine = flat[start : start + most].to(device)
        parts = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(parts, mine, group)
        whole[:, start : start + most] = torch.stack(parts).cpu()
    return whole.view(-1)


def _owned(part: Any) -> Iterator[_Shard]:
    """What a distributed optimizer of Megatron-Core updates on this rank."""
    for parameter in part.model_param_gbuf_map:
        place = part._get_model_param_range_map(parameter)["param"]
        yield _Shard(parameter, place.start, place.end, partial(_own_master, part, parameter))


def _own_master(part: Any, parameter: Tensor) -> Tensor:
    """This rank's part of a master; made anew where the precision-aware optimizer keeps it."""
    group, order = part.model_param_group_index_map[parameter]
    main = part.optimizer.param_groups[group]["params"][order]
    master = part.optimizer.state.get(main, {}).get("master_param")
    if master is None:  # also before that optimizer's first step
        return main.detach().float()
    if master.dtype == torch.int16:
        return join(main.detach(), master)
    return part.optimizer.get_unscaled_state(main, "master_param")


def _whole_master(parameter: Tensor) -> Tensor:
    """The fp32 copy of a 16-bit parameter, or the parameter; flat."""
    master = getattr(parameter, "main_param", None)
    return (parameter if master is None else master).detach().view(-1)
