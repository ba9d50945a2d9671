"""AdamW in Megatron-Core's hands: configuration, parameter groups, rates by step."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megacode.errors import UserError
from megacode.megatron.config import MegatronConfig, refusals, with_types
from megacode.megatron.hardware import detect
from megacode.megatron.model import global_parameter_names
from megacode.megatron.optimizer_state import (
    allocate_state,
    inner_optimizers,
    keep_places_in_buffers,
)
from megacode.megatron.workarounds import refuse_odd_sizes
from megacode.recipe.schema import Model, Optimizer, Recipe


def wrap_data_parallel(
    decided: MegatronConfig, model_chunks: list[Any]
) -> list[DistributedDataParallel]:
    """Megatron-Core's DistributedDataParallel around every model chunk; fp32 gradients.

    Raises:
        UserError: a `parallel.ddp` combination that Megatron-Core refuses.
    """
    recipe = decided.recipe
    with refusals("parallel.ddp", recipe.parallel.ddp):
        wrapped = [
            # Buckets are for the overlap of the first chunk's communication with backward; later
            # chunks finish earlier.
            DistributedDataParallel(
                config=decided.transformer,
                ddp_config=decided.data_parallel,
                module=chunk,
                disable_bucketing=index > 0,
            )
            for index, chunk in enumerate(model_chunks)
        ]
    if recipe.precision.mxfp8_params:
        refuse_odd_sizes(wrapped, global_parameter_names(wrapped))
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def multipliers(recipe: Recipe, name: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
    """(learning-rate, weight-decay) multipliers of a parameter by its Megatron-Core name.

    Biases and norms do not decay. The rate's is that of the last group that matches, times muP's.
    """
    rate, decay = 1.0, 0.0 if parameter.ndim == 1 or name.endswith(".bias") else 1.0
    for group in recipe.optimizer.groups:
        if fnmatch.fnmatchcase(name, group.match):
            rate, decay = group.lr_mult, decay * group.weight_decay_mult
    return rate * mup_multiplier(recipe.model, name, parameter), decay


def mup_multiplier(model: Model, name: str, parameter: torch.nn.Parameter) -> float:
    """muP's factor on the learning rate of a parameter, and with it on its decoupled weight decay.

    Matrices of which both sides grow with the width have one (arXiv 2203.03466, table 8). The
    embeddings and an output layer have the vocabulary on one side, a router its experts, biases and
    norms no second side.
    """
    outer = name.startswith(("embedding.", "output_layer.")) or name.endswith("router.weight")
    return model.width_ratio if model.mup and parameter.ndim >= 2 and not outer else 1.0


def optimizer_fields(recipe: Recipe, overlap_param_gather: bool) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig, without those passed through by their names."""
    settings, precision = recipe.optimizer, recipe.precision.compute
    return dict(
        optimizer="adam",
        lr=max(phase.learning_rate.peak for phase in recipe.phases),
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=precision in ("bf16", "fp8"),
        params_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
        fp8_recipe=recipe.precision.fp8_recipe if precision == "fp8" else None,
        reuse_grad_buf_for_mxfp8_param_ag=recipe.precision.mxfp8_params,
        # Only bf16 weights share their bits with a master weight.
        store_param_remainders=not recipe.precision.fp8_params,
    )


def build_optimizer(recipe: Recipe, model_chunks: list[DistributedDataParallel]) -> Any:
    """Megatron-Core's optimizer with the recipe's groups.

    It drives FusedAdam of Transformer Engine, else of Apex, else torch's AdamW. Every parameter
    group carries `lr_mult` and `wd_mult`; `set_lr` turns them into rates.

    Raises:
        UserError: a group that matches no parameter on any rank, or an `optimizer.megatron` field
            that is refused.
    """
    settings, hardware = recipe.optimizer, detect()
    if settings.megatron.get("optimizer_cpu_offload") and not hardware.on_cuda:
        raise UserError(
            "optimizer.megatron.optimizer_cpu_offload: there is nothing to offload without a CUDA "
            "device, and this machine shows none; take it out"
        )
    if settings.megatron.get("use_precision_aware_optimizer") and hardware.engine is None:
        raise UserError(
            "optimizer.megatron.use_precision_aware_optimizer: needs Transformer Engine's "
            "FusedAdam, which this machine has not; take it out, or train where `megacode doctor` "
            "finds Transformer Engine"
        )
    fields = optimizer_fields(recipe, model_chunks[0].ddp_config.overlap_param_gather)
    names = _names_of_weights(recipe, model_chunks)
    wanted = {id(p): multipliers(recipe, name, p) for name, p in names.items()}
    _refuse_idle_groups(settings, names)
    overrides = {
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=f"lr x {pair[0]}, decay x {pair[1]}",
                fn=lambda p, _, pair=pair: wanted[id(p)] == pair,
            )
        ): {"lr_mult": pair[0], "wd_mult": pair[1]}
        for pair in sorted(set(wanted.values()))
        if pair != (1.0, 1.0)
    }
    with refusals("optimizer.megatron", settings.megatron):
        config = OptimizerConfig(**fields | with_types(OptimizerConfig, settings.megatron))
        optimizer = get_megatron_optimizer(config, model_chunks, config_overrides=overrides)
    allocate_state(optimizer)
    keep_places_in_buffers(optimizer)
    return optimizer


def _names_of_weights(
    recipe: Recipe, model_chunks: list[DistributedDataParallel]
) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the whole model, a tied output layer by its embedding's.

    The last stage of a pipeline has a copy of that embedding under a name of its own, and both must
    be updated alike to stay equal.
    """
    names = global_parameter_names(model_chunks)
    if recipe.model.tie_embeddings and (copy := names.pop("output_layer.weight", None)) is not None:
        names["embedding.word_embeddings.weight"] = copy
    return names


def _refuse_idle_groups(settings: Optimizer, names: Iterable[str]) -> None:
    if not settings.groups:
        return
    mine = list(names)
    matched = torch.tensor(
        [float(any(fnmatch.fnmatchcase(n, g.match) for n in mine)) for g in settings.groups]
    )
    if torch.cuda.is_available():
        matched = matched.cuda()
    torch.distributed.all_reduce(matched, op=torch.distributed.ReduceOp.MAX)
    for group, hit in zip(settings.groups, matched.tolist(), strict=True):
        if not hit:
            raise UserError(
                f"optimizer.groups: {group.match!r} matches no parameter; names look like "
                f"{mine[0]!r} and {mine[-1]!r}"
            )


def set_lr(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Rate and weight decay of this step, times each group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def adam_of(optimizer: Any) -> str:
    """Whose Adam Megatron-Core found: Transformer Engine's, Apex's or torch's."""
    kinds = {type(inner) for inner in inner_optimizers(optimizer)}
    homes = {"transformer_engine": "FusedAdam of Transformer Engine", "apex": "FusedAdam of Apex"}
    return " and ".join(
        sorted(homes.get(kind.__module__.split(".")[0], "torch's AdamW") for kind in kinds)
    )
