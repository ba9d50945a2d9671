"""Overlap and fusion: which of Megatron-Core's are on for a recipe on given hardware, and why.

Everything is on where it is valid; a key set to `false` turns one off, and `true` where it cannot be is a mistake with a
sentence. The decisions are made here once, without torch, so that a plan shows what a run will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megacode.errors import UserError
from megacode.plan.hardware import Hardware
from megacode.recipe.schema import Recipe

_Verdict = tuple[Literal["on", "only if asked", "moot", "impossible"], str]
_NO_ENGINE = "it needs Transformer Engine on a CUDA device"
_NO_CUDA = "it needs a CUDA device"
_SAME_CORES = "gloo computes and communicates on the same cores"


@dataclass(frozen=True)
class OverlapDecision:
    """One overlap or fusion: whether it is on, and the reason in a clause."""

    key: str
    on: bool
    why: str


def decide_overlaps(
    recipe: Recipe, hardware: Hardware, data_size: int
) -> dict[str, OverlapDecision]:
    """Every overlap and fusion by the name of its recipe key (`grad_reduce`, `rope` ...).

    Args:
        data_size: data-parallel ranks.

    Raises:
        UserError: one is asked for that cannot be; a line for each.
    """
    decided: dict[str, OverlapDecision] = {}
    mistakes = []
    for name, (section, rule) in _RULES.items():
        key = f"{section}.{name}"
        asked = getattr(
            recipe.parallel.overlap if section == "parallel.overlap" else recipe.fusion, name
        )
        verdict, why = rule(recipe, hardware, data_size)
        if asked and verdict == "impossible":
            mistakes.append(
                f"{key}: cannot be on: {why}; take the key out, which turns it on where it can be"
            )
        on = verdict == "on" if asked is None else asked and verdict in ("on", "only if asked")
        decided[name] = OverlapDecision(
            key, on, "turned off in the recipe" if asked is False else why
        )
    if mistakes:
        raise UserError("\n".join(mistakes))
    return decided


# -------------------------------------------------------------------------------------------------------- overlap


def _grad_reduce(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if data_size * recipe.parallel.context == 1:  # context-parallel ranks have the same weights
        return "moot", "one data-parallel rank has nothing to reduce"
    if not hardware.on_cuda:
        return "only if asked", _SAME_CORES
    return "on", "gradients are reduced while backward goes on"


def _param_gather(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if data_size * recipe.parallel.context == 1:
        return "moot", "one data-parallel rank has nothing to gather"
    if not recipe.parallel.distributed_optimizer:
        return "moot", "without parallel.distributed_optimizer nothing is gathered"
    if recipe.precision.mxfp8_params:
        return (
            "impossible",
            "mxfp8 weights are gathered in the gradients' buffer, which the next forward needs",
        )
    asked = recipe.parallel.overlap.grad_reduce
    if not (hardware.on_cuda if asked is None else asked):
        return "impossible", "Megatron-Core wants parallel.overlap.grad_reduce with it"
    if not hardware.on_cuda:
        return "only if asked", _SAME_CORES
    return "on", "new weights are gathered while the next forward goes on"


def _tensor(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if recipe.parallel.tensor == 1:
        return "moot", "parallel.tensor is 1"
    if hardware.engine is None:
        return "impossible", _NO_ENGINE
    if hardware.engine < (2, 7):
        return "impossible", "it needs Transformer Engine 2.7"
    if recipe.precision.compute == "fp32":
        return "impossible", "its buffers hold numbers of 16 bits or fewer, and precision is fp32"
    if not recipe.parallel.sequence:
        return "impossible", "it needs parallel.sequence: true"
    if _several_lengths(recipe):
        return (
            "impossible",
            "its buffers have one size, and the phases have several sequence lengths",
        )
    return "on", "tensor-parallel exchanges go on during the matrix products"


def _pipeline(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if recipe.parallel.virtual_pipeline is None:
        return (
            "moot",
            "only interleaved pipelines (parallel.virtual_pipeline) overlap their exchanges",
        )
    if not hardware.on_cuda:
        return "impossible", "gloo matches the messages of two ranks in order"
    return "on", "exchanges between stages go on during other chunks' work"


# --------------------------------------------------------------------------------------------------------- fusion


def _rope(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if recipe.model.position_embedding != "rotary":
        return "moot", "there are no rotary positions"
    if hardware.engine is None:
        return "impossible", _NO_ENGINE
    if recipe.model.rotary_interleaved and hardware.engine < (2, 3):
        return "impossible", "interleaved rotary positions need Transformer Engine 2.3"
    return "on", "one kernel rotates queries and keys"


def _cross_entropy(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if hardware.engine is None:
        return "impossible", _NO_ENGINE
    return "on", "one kernel for the loss and its gradient, in the logits' place"


def _activation(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if not hardware.on_cuda:
        return "impossible", _NO_CUDA
    if recipe.model.activation != "swiglu":
        return (
            "impossible",
            f"Megatron-Core has none that computes {recipe.model.activation} exactly",
        )
    return "on", "bias, gate and product in one kernel"


def _bias_dropout(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    return (
        ("on", "bias, dropout and residual in one kernel")
        if hardware.on_cuda
        else ("impossible", _NO_CUDA)
    )


def _gradient_accumulation(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if not hardware.on_cuda:
        return "impossible", _NO_CUDA
    if hardware.engine is None and not hardware.apex_gradients:
        return "impossible", "it needs Transformer Engine or Apex"
    without = "" if hardware.apex_gradients else " (not the output layer's, which needs Apex)"
    return "on", f"matrix products add weight gradients to the fp32 sums themselves{without}"


def _cuda_graphs(recipe: Recipe, hardware: Hardware, data_size: int) -> _Verdict:
    if hardware.engine is None:
        return "impossible", _NO_ENGINE
    if _several_lengths(recipe):
        return (
            "impossible",
            "a recorded graph has one shape, and the phases have several sequence lengths",
        )
    if any(map(recipe.resets, recipe.phases)):
        return (
            "impossible",
            "a recorded graph has one shape, and data.reset_at_eod packs documents of any number",
        )
    if recipe.model.dropout or recipe.model.attention_dropout:
        return (
            "impossible",
            "dropout is drawn anew for every step, and a recorded graph keeps its generators",
        )
    return (
        "only if asked",
        "they help where a layer's kernels are shorter than their launches, and take memory",
    )


def _several_lengths(recipe: Recipe) -> bool:
    return len({phase.sequence_length for phase in recipe.phases}) > 1


_RULES: dict[str, tuple[str, Callable[[Recipe, Hardware, int], _Verdict]]] = {
    "grad_reduce": ("parallel.overlap", _grad_reduce),
    "param_gather": ("parallel.overlap", _param_gather),
    "tensor": ("parallel.overlap", _tensor),
    "pipeline": ("parallel.overlap", _pipeline),
    "rope": ("fusion", _rope),
    "cross_entropy": ("fusion", _cross_entropy),
    "activation": ("fusion", _activation),
    "bias_dropout": ("fusion", _bias_dropout),
    "gradient_accumulation": ("fusion", _gradient_accumulation),
    "cuda_graphs": ("fusion", _cuda_graphs),
}
