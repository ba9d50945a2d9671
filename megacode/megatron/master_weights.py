"""fp32 master weights in checkpoints, whole, also where the optimizer keeps only what the bf16 weights leave of them.

Transformer Engine's FusedAdam can keep 16 bits of each master weight beside the 16 of the bf16 weight (`store_param_remainders`,
part of Megatron-Core's precision-aware optimizer): with both as integers, master = weight * 2^16 + remainder, and the weight is
the master rounded to the nearest. Megatron-Core would write the remainders into checkpoints as if they were master weights, and
cannot read them back (0.16 to 0.19). Here checkpoints hold the sum, so that every kind of optimizer continues every other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megacode.megatron.chained_optimizer import parts_with_state


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """float32 masters from bfloat16 weights and their remainders (integers from -2^15 to 2^15 - 1, of any type); one shape."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(
        torch.float32
    )


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16 weights, int16 remainders) of float32 masters, in their shape."""
    bits = master.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower half, as a signed number
    return ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16), remainder


def make_whole(optimizer: Any, state: dict[str, Any]) -> None:
    """Turn remainders into masters in what Megatron-Core is about to write, in place.

    Args:
        state: of `optimizer.sharded_state_dict`, fully reshardable: its tensors are on the CPU.
    """
    for weight, tensors in _kept_as_remainders(optimizer, state):
        master, bits = tensors["param"].data.view(-1), weight.reshape(-1)
        for part in _parts(master):
            master[part] = join(bits[part], master[part].to(weight.device)).to(master.device)


def make_remainders(optimizer: Any, state: dict[str, Any]) -> None:
    """Turn float32 masters that were read into int16 remainders, in `state`, and set the weights to what remains."""
    for weight, tensors in _kept_as_remainders(optimizer, state):
        master = tensors["param"]
        remainder = torch.empty_like(master, dtype=torch.int16)
        for part in _parts(master.view(-1)):
            rounded, kept = split(master.view(-1)[part].to(weight.device))
            weight.view(-1)[part] = rounded
            remainder.view(-1)[part] = kept.to(remainder.device)
        tensors["param"] = remainder


def _parts(flat: Tensor) -> Iterator[slice]:
    """On the device, where it is quick, yet with little memory of it: a part takes 0.3 GB."""
    return (slice(start, start + 2**24) for start in range(0, flat.numel(), 2**24))


def _kept_as_remainders(
    optimizer: Any, state: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(weight, its optimizer state) for every weight of which only the remainder is kept; in Megatron-Core's order."""
    for part, kept in parts_with_state(optimizer, state):
        if "param_state" not in kept or not getattr(
            part.optimizer, "store_param_remainders", False
        ):
            continue
        if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            continue  # Megatron-Core keeps the masters itself
        weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
        for index, weight in enumerate(weights):
            if weight.dtype == torch.bfloat16:
                yield weight.detach(), kept["param_state"][index]
