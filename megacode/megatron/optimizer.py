"""AdamW in Megatron-Core's hands: configuration, parameter groups, rates by step, fresh state."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megacode.errors import UserError
from megacode.megatron.chained_optimizer import parts_with_state
from megacode.megatron.config import MegatronConfig
from megacode.megatron.hardware import detect
from megacode.megatron.model import global_parameter_names
from megacode.megatron.mup import rate_multiplier
from megacode.recipe.megatron_fields import DTYPES
from megacode.recipe.schema import Optimizer, Recipe

OTHER_GROUPS = (
    "was trained with other optimizer.groups or another model.mup; undo the change, or start a new run from its weights with "
    "`initialize_from`"
)


def wrap_data_parallel(
    decided: MegatronConfig, model_chunks: list[Any]
) -> list[DistributedDataParallel]:
    """Megatron-Core's DistributedDataParallel around every model chunk; fp32 gradients; overlap where it is on.

    Raises:
        UserError: a `parallel.ddp` combination that Megatron-Core refuses.
    """
    recipe, config, ddp_config = decided.recipe, decided.transformer, decided.data_parallel
    with _refusals_of("parallel.ddp", recipe.parallel.ddp):
        wrapped = [
            # Bucketing serves the overlap of the first chunk's communication with backward; later chunks finish earlier.
            DistributedDataParallel(
                config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
            )
            for index, chunk in enumerate(model_chunks)
        ]
    if recipe.precision.mxfp8_params:
        _refuse_odd_sizes(wrapped)
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


@contextlib.contextmanager
def _refusals_of(section: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Megatron-Core's refusals as sentences, where the recipe has fields of its own in `section` that they may be about."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        if not given:
            raise
        words = next((line for line in str(error).splitlines() if line.strip()), "")
        if not words:  # it often asserts without any
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words = f"it wants `{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
        raise UserError(
            f"{section}: Megatron-Core refuses a field of it ({', '.join(given)}): {words}; change it or take it out"
        ) from error


def _refuse_odd_sizes(wrapped: list[DistributedDataParallel]) -> None:
    """Megatron-Core (0.16) reads gathered mxfp8 weights as if they lay close together in their buffer, and starts each at a
    multiple of 64 numbers: behind one of another size, every weight would be another's."""
    names = {id(parameter): name for name, parameter in global_parameter_names(wrapped).items()}
    for buffer in (
        buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    ):
        for bucket in buffer.buckets:
            for parameter, (start, _) in bucket.param_to_index.items():
                if buffer.param_index_map[parameter][0] - bucket.offset != start:
                    odd = next(p for p in bucket.param_to_index if p.numel() % 64)
                    raise UserError(
                        f"precision.fp8_params: with `fp8_recipe: mxfp8` every parameter needs a multiple of 64 numbers on each "
                        f"rank, and {names[id(odd)]} has {odd.numel()}; set it to false, or change the model's sizes"
                    )


def multipliers(recipe: Recipe, name: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
    """(learning-rate, weight-decay) multipliers of a parameter by its Megatron-Core name; biases and norms do not decay.

    The rate's is that of the last group that matches, times muP's.
    """
    rate, decay = 1.0, 0.0 if parameter.ndim == 1 or name.endswith(".bias") else 1.0
    for group in recipe.optimizer.groups:
        if fnmatch.fnmatchcase(name, group.match):
            rate, decay = group.lr_mult, decay * group.weight_decay_mult
    return rate * rate_multiplier(recipe.model, name, parameter), decay


def optimizer_fields(recipe: Recipe, overlap_param_gather: bool) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig, without those passed through by their own names."""
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
    """Megatron-Core's optimizer (FusedAdam of Transformer Engine, else of Apex, else torch's AdamW) with the recipe's groups.

    Every parameter group carries `lr_mult` and `wd_mult`; `set_lr` turns them into rates.

    Raises:
        UserError: a group that matches no parameter on any rank, or an `optimizer.megatron` field that is refused.
    """
    settings = recipe.optimizer
    fields = optimizer_fields(recipe, model_chunks[0].ddp_config.overlap_param_gather)
    if settings.megatron.get("optimizer_cpu_offload") and not detect().on_cuda:
        raise UserError(
            "optimizer.megatron.optimizer_cpu_offload: there is nothing to offload without a CUDA device, and this machine shows "
            "none; take it out"
        )
    if settings.megatron.get("use_precision_aware_optimizer") and detect().engine is None:
        raise UserError(
            "optimizer.megatron.use_precision_aware_optimizer: needs Transformer Engine's FusedAdam, which this machine has not; "
            "take it out, or train where `megacode doctor` finds Transformer Engine"
        )
    try:
        config = OptimizerConfig(**(fields | _with_dtypes(settings.megatron)))
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"optimizer.megatron: Megatron-Core refuses this: {error}") from error

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
    with _refusals_of("optimizer.megatron", settings.megatron):
        optimizer = get_megatron_optimizer(config, model_chunks, config_overrides=overrides)
    _allocate_state(optimizer)
    return optimizer


def _names_of_weights(
    recipe: Recipe, model_chunks: list[DistributedDataParallel]
) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the whole model, a tied output layer by its embedding's: the last stage of a pipeline has a
    copy of that under a name of its own, and both must be updated alike to stay equal."""
    names = global_parameter_names(model_chunks)
    if recipe.model.tie_embeddings and (copy := names.pop("output_layer.weight", None)) is not None:
        names["embedding.word_embeddings.weight"] = copy
    return names


def _with_dtypes(given: Mapping[str, Any]) -> dict[str, Any]:
    """`optimizer.megatron` with names of dtypes as dtypes. FP8 moments are bytes with a scale beside them."""
    dtypes = dict(
        zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16, torch.uint8), strict=True)
    )
    kinds = {field.name: field.type for field in dataclasses.fields(OptimizerConfig)}
    return {
        name: dtypes[value] if kinds.get(name) in (torch.dtype, "torch.dtype") else value
        for name, value in given.items()
    }


def _allocate_state(optimizer: Any) -> None:
    """Adam's state from the start where Adam is torch's: Megatron-Core reads its step count from there when it saves and
    loads, also before the first step. FusedAdam keeps the count in its groups and needs nothing."""
    for inner in inner_optimizers(optimizer):
        if _is_torch(inner):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


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
                f"optimizer.groups: {group.match!r} matches no parameter; names look like {mine[0]!r} and {mine[-1]!r}"
            )


def set_lr(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Rate and weight decay of this step, times each group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch-style optimizers inside Megatron-Core's (chained) wrapper."""
    chained = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    return [part.optimizer for part in chained if part.optimizer is not None]


def adam_of(optimizer: Any) -> str:
    """Whose Adam Megatron-Core found: Transformer Engine's, Apex's or torch's."""
    kinds = {type(inner) for inner in inner_optimizers(optimizer)}
    homes = {"transformer_engine": "FusedAdam of Transformer Engine", "apex": "FusedAdam of Apex"}
    return " and ".join(
        sorted(homes.get(kind.__module__.split(".")[0], "torch's AdamW") for kind in kinds)
    )


def reset_optimizer_state(optimizer: Any) -> None:
    """Adam's moments and step counts as on the first step; weights, master weights and groups stay."""
    for inner in inner_optimizers(optimizer):
        for state in inner.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key].zero_()
            if "step" in state:
                state["step"] = (
                    torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
                )
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = (
                    torch.zeros_like(group["step"]) if torch.is_tensor(group["step"]) else 0
                )


def other_multipliers(optimizer: Any, state: dict[str, Any]) -> str | None:
    """What is wrong where a checkpoint's parameter groups are not those of this recipe: Megatron-Core finds a group's state by
    its multipliers, and knows no remedy for one that is not there."""

    def pairs(groups: Iterable[Mapping[str, Any]]) -> set[tuple[float, float]]:
        return {(group.get("lr_mult", 1.0), group.get("wd_mult", 1.0)) for group in groups}

    def shown(found: set[tuple[float, float]]) -> str:
        return ", ".join(f"{rate:g} and {decay:g}" for rate, decay in sorted(found))

    for part, kept in parts_with_state(optimizer, state):
        here, there = (
            pairs(part.optimizer.param_groups),
            pairs(kept.get("optimizer", kept)["param_groups"]),
        )
        if here - there:
            return f"{OTHER_GROUPS} (its multipliers of rate and weight decay are {shown(there)}; here: {shown(here)})"
    return None


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Megatron-Core's `load_state_dict`, whichever Adam it drives here and drove where the checkpoint was made.

    The distributed optimizer's fully reshardable format keeps the step count in the parameter groups, yet copies every entry
    of a parameter's Adam state, for torch's Adam including `step`, from the checkpoint (megatron-core 0.16.1). So the tensors
    are loaded while `step` stands aside.
    """
    for part, kept in parts_with_state(optimizer, state):
        _as_kept_by(part.optimizer, kept)
    torch_adam = [adam for adam in inner_optimizers(optimizer) if _is_torch(adam)]
    if not torch_adam or "param_state" not in state:
        optimizer.load_state_dict(state)
        return
    (distributed,) = getattr(optimizer, "chained_optimizers", None) or [optimizer]
    tensors = state.pop("param_state")
    state.pop("param_state_sharding_type", None)
    distributed.load_state_dict(state)
    steps = {
        id(p): s.pop("step") for adam in torch_adam for p, s in adam.state.items() if "step" in s
    }
    distributed.load_parameter_state_from_fully_reshardable(tensors)
    for adam in torch_adam:
        for parameter, entry in adam.state.items():
            entry["step"] = steps[id(parameter)].clone()


def _is_torch(adam: torch.optim.Optimizer) -> bool:
    return isinstance(adam, torch.optim.AdamW | torch.optim.Adam)


def _as_kept_by(adam: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a checkpoint's parameter groups and step count as this Adam keeps them, in place.

    torch's counts steps in every parameter's state, the fused ones in the groups; each has options that others do not know.
    Outside the distributed optimizer Megatron-Core stores torch's count once, as `common_step`, and leaves out a zero.
    """
    groups_and_state = state.get("optimizer", state)
    moments = groups_and_state.get("state")
    counts = [group["step"] for group in groups_and_state["param_groups"] if "step" in group]
    if moments is not None and "common_step" in moments:
        counts = [moments.pop("common_step")]
    count = int(counts[0]) if counts else 0
    options = {
        key: value for key, value in adam.param_groups[0].items() if key not in ("params", "step")
    }
    for group in groups_and_state["param_groups"]:
        for key, value in options.items():
            group.setdefault(key, value)
        group["step"] = count
    if moments is not None and _is_torch(adam):
        moments["common_step"] = torch.tensor(float(count))
        for group in groups_and_state["param_groups"]:
            del group["step"]
