"""The optimizer's state: at the start, reset, and the same in checkpoints whichever Adam keeps it.

Megatron-Core drives Transformer Engine's FusedAdam, else Apex's, else torch's AdamW. A run goes on
from a checkpoint with another Adam than the one that made it:

- step count and options are put as the Adam here keeps them (`_as_kept_by`);
- checkpoints hold whole fp32 master weights. FusedAdam can keep 16 bits of each beside the 16 of
  the bf16 weight (`store_param_remainders`, part of Megatron-Core's precision-aware optimizer):
  with both as integers, master = weight * 2^16 + remainder, and the weight is the master rounded
  to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

OTHER_GROUPS = (
    "was trained with other optimizer.groups or another model.mup; undo the change, or start a new "
    "run from its weights with `initialize_from`"
)
_PIECE = 2**24
"""Numbers joined or split on the device at once: quick, and only 0.3 GB of it."""


def _parts_with_state(
    optimizer: Any, state: dict[Any, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Megatron-Core's optimizers that have parameters here, each with its part of a checkpoint.

    Megatron-Core chains several where parameters differ in kind; a chain of one stores its state
    as it is, a longer one by number (megatron/core/optimizer/optimizer.py, ChainedOptimizer).
    """
    parts = optimizer_parts(optimizer)
    for number, part in enumerate(parts):
        if part.optimizer is not None:
            yield part, state if len(parts) == 1 else state[number]


def optimizer_parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", None) or [optimizer]


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch-style optimizers inside Megatron-Core's (chained) wrapper."""
    return [part.optimizer for part in optimizer_parts(optimizer) if part.optimizer is not None]


def _is_torch(adam: torch.optim.Optimizer) -> bool:
    return isinstance(adam, torch.optim.AdamW | torch.optim.Adam)


def allocate_state(optimizer: Any) -> None:
    """Give torch's Adam its state from the start.

    Upstream fault: Megatron-Core reads torch's step count from that state when it saves and loads,
        and fails before the first step. FusedAdam keeps the count in its groups.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: it allocates `step` with the moments. Test: `test_state_before_the_first_step`.
    """
    for adam in filter(_is_torch, inner_optimizers(optimizer)):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def reset_optimizer_state(optimizer: Any) -> None:
    """Adam's moments and step counts as on the first step; weights, masters and groups stay."""
    for adam in inner_optimizers(optimizer):
        for holder in (*adam.state.values(), *adam.param_groups):
            for key in holder.keys() & {"exp_avg", "exp_avg_sq", "step"}:
                if torch.is_tensor(holder[key]):
                    holder[key].zero_()
                else:
                    holder[key] = 0


# ------------------------------------------------------------------------------------- checkpoints


def keep_places_in_buffers(optimizer: Any) -> None:
    """Save every parameter's state from its own place, where several buckets are padded.

    Upstream fault: the distributed optimizer gathers masters and moments without the padding that
        ends each bucket of gradients, and cuts parameters out of them by places that count it. From
        the second bucket on, a checkpoint holds numbers of the parameters beside. A bucket is
        padded where its size is no multiple of 128 and of the number of data-parallel ranks.
    Versions: Megatron-Core 0.16.
    Remove when: both sides count alike. Test: `test_padding_between_buckets`.
    """
    for part in optimizer_parts(optimizer):
        if getattr(part, "buffers", None):
            gather = part.get_parameter_state_dp_zero
            part.get_parameter_state_dp_zero = partial(_gather_with_padding, part.buffers, gather)


def _gather_with_padding(buffers: Sequence[Any], gather: Any, *args: Any, **keys: Any) -> Any:
    state = gather(*args, **keys)
    for number, buffer in enumerate(buffers if state else ()):
        last = buffer.buckets[-1]
        if last.offset + last.numel_unpadded == buffer.numel_unpadded:
            continue  # no padding but at the end
        for tensors in state[number].values():
            for name, numbers in tensors.items():
                if torch.is_tensor(numbers):
                    parts = numbers.split([bucket.numel_unpadded for bucket in buffer.buckets])
                    tensors[name] = numbers.new_zeros(buffer.numel)
                    for bucket, part in zip(buffer.buckets, parts, strict=True):
                        tensors[name][bucket.offset : bucket.offset + len(part)] = part
    return state


def other_multipliers(optimizer: Any, state: dict[str, Any]) -> str | None:
    """What is wrong where a checkpoint's parameter groups are not those of this recipe.

    Megatron-Core finds a group's state by its multipliers, and ends in a KeyError without one.
    """

    def pairs(groups: Iterable[Mapping[str, Any]]) -> set[tuple[float, float]]:
        return {(group.get("lr_mult", 1.0), group.get("wd_mult", 1.0)) for group in groups}

    def shown(found: set[tuple[float, float]]) -> str:
        return ", ".join(f"{rate:g} and {decay:g}" for rate, decay in sorted(found))

    for part, kept in _parts_with_state(optimizer, state):
        here = pairs(part.optimizer.param_groups)
        there = pairs(kept.get("optimizer", kept)["param_groups"])
        if here - there:
            return (
                f"{OTHER_GROUPS} (its multipliers of rate and weight decay are {shown(there)}; "
                f"here: {shown(here)})"
            )
    return None


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Megatron-Core's `load_state_dict`, whichever Adam it drives here and drove at the saving.

    Upstream fault: the distributed optimizer's fully reshardable format keeps the step count in
        the parameter groups, but loading copies every entry of a parameter's Adam state, of
        torch's also `step`, from the tensors. They are loaded while `step` stands aside.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: torch's `step` is left out there. Test: `test_step_among_the_tensors`.
    """
    apart = []
    for part, kept in _parts_with_state(optimizer, state):
        _as_kept_by(part.optimizer, kept)
        if _is_torch(part.optimizer) and "param_state" in kept:
            del kept["param_state_sharding_type"]
            apart.append((part, kept.pop("param_state")))
    _masters_to_remainders(optimizer, state)
    optimizer.load_state_dict(state)
    for part, tensors in apart:
        entries = list(part.optimizer.state.values())
        steps = [entry.pop("step") for entry in entries]
        part.load_parameter_state_from_fully_reshardable(tensors)
        for entry, step in zip(entries, steps, strict=True):
            entry["step"] = step.clone()


def _as_kept_by(adam: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a checkpoint's parameter groups and step count as this Adam keeps them, in place.

    Upstream fault: Megatron-Core stores them as the Adam there keeps them. torch's counts steps in
        every parameter's state (stored once, as `common_step`, outside the distributed optimizer,
        and not at all while zero), the fused ones in the groups; each has options that others do
        not know.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: checkpoints do not depend on the Adam. Test: `test_another_adam`.
    """
    inner = state.get("optimizer", state)
    moments, groups = inner.get("state"), inner["param_groups"]
    counts = [group["step"] for group in groups if "step" in group]
    if moments is not None and "common_step" in moments:
        counts = [moments.pop("common_step")]
    count = int(counts[0]) if counts else 0
    options = adam.param_groups[0].items()
    for group in groups:
        for key, value in options:
            if key not in ("params", "step"):
                group.setdefault(key, value)
        group["step"] = count
    if moments is not None and _is_torch(adam):
        moments["common_step"] = torch.tensor(float(count))
        for group in groups:
            del group["step"]


# ---------------------------------------------------------------------------------- master weights


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """float32 masters of bfloat16 weights and their remainders (whole numbers, any type)."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.to(torch.int32)).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16 weights, int16 remainders) of float32 masters, in their shape."""
    bits = master.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower half, as a signed number
    return ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16), remainder


def remainders_to_masters(optimizer: Any, state: dict[str, Any]) -> None:
    """Turn remainders into masters in what Megatron-Core is about to save, in place.

    Upstream fault: Megatron-Core saves remainders as if they were master weights, and cannot load
        them again.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: it saves whole master weights. Test: `test_remainders_are_saved_as_masters`.

    Args:
        state: of `optimizer.sharded_state_dict`, fully reshardable: its tensors are on the CPU.
    """
    for weight, tensors in _kept_as_remainders(optimizer, state):
        for master, bits in zip(*_pieces(tensors["param"].data, weight), strict=True):
            master.copy_(join(bits, master.to(weight.device)))


def _masters_to_remainders(optimizer: Any, state: dict[str, Any]) -> None:
    """Turn float32 masters that were loaded into int16 remainders, and set the weights to match."""
    for weight, tensors in _kept_as_remainders(optimizer, state):
        masters = tensors["param"]
        tensors["param"] = torch.empty_like(masters, dtype=torch.int16)
        pieces = _pieces(masters, weight, tensors["param"])
        for master, bits, remainder in zip(*pieces, strict=True):
            rounded, kept = split(master.to(weight.device))
            bits.copy_(rounded)
            remainder.copy_(kept)


def _pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.view(-1).split(_PIECE) for tensor in tensors]


def _kept_as_remainders(
    optimizer: Any, state: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(weight, its state) where only the remainder is kept, in Megatron-Core's order."""
    for part, kept in _parts_with_state(optimizer, state):
        if (
            "param_state" in kept
            and getattr(part.optimizer, "store_param_remainders", False)
            and part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        ):
            weights = [weight for buffer in part.buffers for weight in buffer.param_index_map]
            for index, weight in enumerate(weights):
                if weight.dtype == torch.bfloat16:
                    yield weight.detach(), kept["param_state"][index]
