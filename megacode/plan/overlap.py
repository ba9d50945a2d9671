"""Overlap and fusion: which of Megatron-Core's are on for a recipe on given hardware, and why.

Everything is on where it is valid; a key set to `false` turns one off, and `true` where it cannot
be is a mistake with a sentence. The decisions are made here once, without torch, so that a plan
shows what a run will do.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacode.errors import UserError
from megacode.plan.hardware import Hardware
from megacode.recipe.schema import Recipe

# Verdicts: on; off unless the recipe asks for it; without effect; a mistake if the recipe asks for
# it.
_ON, _ASK, _MOOT, _NO = "on", "only if asked", "moot", "impossible"
_Rules = list[tuple[bool, str, str]]
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
    rules = {**_overlaps(recipe, hardware, data_size), **_fusions(recipe, hardware)}
    for key, cases in rules.items():
        name = key.rpartition(".")[2]
        section = recipe.fusion if key.startswith("fusion.") else recipe.parallel.overlap
        asked = getattr(section, name)
        verdict, why = next((verdict, why) for holds, verdict, why in cases if holds)
        if asked and verdict == _NO:
            mistakes.append(
                f"{key}: cannot be on: {why}; take the key out, which turns it on where it can be"
            )
        on = verdict == _ON if asked is None else asked and verdict in (_ON, _ASK)
        why = "turned off in the recipe" if asked is False else why
        decided[name] = OverlapDecision(key, on, why)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return decided


def _overlaps(recipe: Recipe, hardware: Hardware, data_size: int) -> dict[str, _Rules]:
    """Of each overlap the cases in their order: the first that holds decides."""
    parallel, precision = recipe.parallel, recipe.precision
    one_rank = data_size * parallel.context == 1  # context-parallel ranks have the same weights
    reduce = parallel.overlap.grad_reduce
    reduces = hardware.on_cuda if reduce is None else reduce
    sharded, cuda = parallel.distributed_optimizer, hardware.on_cuda
    several, fp32 = _several_lengths(recipe), precision.compute == "fp32"
    no_engine, engine = hardware.engine is None, hardware.engine or (0,)
    return {
        "parallel.overlap.grad_reduce": [
            (one_rank, _MOOT, "one data-parallel rank has nothing to reduce"),
            (not cuda, _ASK, _SAME_CORES),
            (True, _ON, "gradients are reduced while backward goes on"),
        ],
        "parallel.overlap.param_gather": [
            (one_rank, _MOOT, "one data-parallel rank has nothing to gather"),
            (not sharded, _MOOT, "without parallel.distributed_optimizer nothing is gathered"),
            (
                precision.mxfp8_params,
                _NO,
                "mxfp8 weights are gathered in the gradients' buffer, which the next forward needs",
            ),
            (not reduces, _NO, "Megatron-Core wants parallel.overlap.grad_reduce with it"),
            (not cuda, _ASK, _SAME_CORES),
            (True, _ON, "new weights are gathered while the next forward goes on"),
        ],
        "parallel.overlap.tensor": [
            (parallel.tensor == 1, _MOOT, "parallel.tensor is 1"),
            (no_engine, _NO, _NO_ENGINE),
            (engine < (2, 7), _NO, "it needs Transformer Engine 2.7"),
            (fp32, _NO, "its buffers hold numbers of 16 bits or fewer, and precision is fp32"),
            (not parallel.sequence, _NO, "it needs parallel.sequence: true"),
            (
                several,
                _NO,
                "its buffers have one size, and the phases have several sequence lengths",
            ),
            (
                parallel.context > 1 and any(map(recipe.resets, recipe.phases)),
                _NO,
                "its buffers have one size, and rows of padded documents have many",
            ),
            (True, _ON, "tensor-parallel exchanges go on during the matrix products"),
        ],
        "parallel.overlap.pipeline": [
            (
                not parallel.virtual_pipeline,
                _MOOT,
                "only interleaved pipelines (parallel.virtual_pipeline) overlap their exchanges",
            ),
            (not cuda, _NO, "gloo matches the messages of two ranks in order"),
            (True, _ON, "exchanges between stages go on during other chunks' work"),
        ],
    }


def _fusions(recipe: Recipe, hardware: Hardware) -> dict[str, _Rules]:
    """Of each fusion the cases in their order: the first that holds decides."""
    model = recipe.model
    no_engine, engine = hardware.engine is None, hardware.engine or (0,)
    cuda, apex, several = hardware.on_cuda, hardware.apex_gradients, _several_lengths(recipe)
    rotary, resets = model.position_embedding == "rotary", any(map(recipe.resets, recipe.phases))
    dropout = bool(model.dropout or model.attention_dropout)
    without = "" if apex else " (not the output layer's, which needs Apex)"
    return {
        "fusion.rope": [
            (not rotary, _MOOT, "there are no rotary positions"),
            (no_engine, _NO, _NO_ENGINE),
            (
                model.rotary_interleaved and engine < (2, 3),
                _NO,
                "interleaved rotary positions need Transformer Engine 2.3",
            ),
            # Upstream fault: Megatron-Core does not hand the kernel for packed documents the
            #     attention factor or the order of pairs, and leaves the kernel for others where
            #     there is a factor, with a warning in every layer.
            # Versions: Megatron-Core 0.16 to 0.19.
            # Remove when: both kernels take both. Test: `test_packed_rotary_kernel_is_told_less`.
            (_yarn(recipe), _NO, "Transformer Engine's kernel has no attention factor (yarn)"),
            (
                model.rotary_interleaved and resets,
                _NO,
                "Megatron-Core's kernel for packed documents has no interleaved positions",
            ),
            (True, _ON, "one kernel rotates queries and keys"),
        ],
        "fusion.cross_entropy": [
            (no_engine, _NO, _NO_ENGINE),
            (True, _ON, "one kernel for the loss and its gradient, in the logits' place"),
        ],
        "fusion.activation": [
            (not cuda, _NO, _NO_CUDA),
            (
                model.activation != "swiglu",
                _NO,
                f"Megatron-Core has none that computes {model.activation} exactly",
            ),
            (True, _ON, "bias, gate and product in one kernel"),
        ],
        "fusion.bias_dropout": [
            (not cuda, _NO, _NO_CUDA),
            (True, _ON, "bias, dropout and residual in one kernel"),
        ],
        "fusion.gradient_accumulation": [
            (not cuda, _NO, _NO_CUDA),
            (no_engine and not apex, _NO, "it needs Transformer Engine or Apex"),
            (
                True,
                _ON,
                f"matrix products add weight gradients to the fp32 sums themselves{without}",
            ),
        ],
        "fusion.cuda_graphs": [
            (no_engine, _NO, _NO_ENGINE),
            (
                several,
                _NO,
                "a recorded graph has one shape, and the phases have several sequence lengths",
            ),
            (
                resets,
                _NO,
                "a recorded graph has one shape, and data.reset_at_eod packs documents of any "
                "number",
            ),
            (
                any(phase.rotary_base or phase.rotary_scaling for phase in recipe.phases),
                _NO,
                "a recorded graph has one kind of rotary positions, and the phases have several",
            ),
            (
                dropout,
                _NO,
                "dropout is drawn anew for every step, and a recorded graph keeps its generators",
            ),
            (
                True,
                _ASK,
                "they help where a layer's kernels are shorter than their launches, and take "
                "memory",
            ),
        ],
    }


def _yarn(recipe: Recipe) -> bool:
    scalings = (recipe.model.rotary_scaling, *(phase.rotary_scaling for phase in recipe.phases))
    return any(scaling and scaling.kind == "yarn" for scaling in scalings)


def _several_lengths(recipe: Recipe) -> bool:
    return len({phase.sequence_length for phase in recipe.phases}) > 1
