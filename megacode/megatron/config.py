"""Recipe and hardware -> the fields of Megatron-Core's configuration objects.

`transformer_fields` and `data_parallel_fields` are pure functions of (recipe, hardware, what is
on): what a GPU run will be handed can be read, and is tested, on a machine without one. `_known`
leaves out what the installed version of Megatron-Core does not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from megacode.errors import UserError
from megacode.megatron.hardware import detect
from megacode.megatron.workarounds import MUP_IS_UPSTREAM, two_stages_interleaved
from megacode.plan.hardware import Hardware, fp8_refusal
from megacode.plan.overlap import OverlapDecision, decide_overlaps
from megacode.recipe.megatron_fields import DTYPES
from megacode.recipe.schema import Recipe

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "squared-relu": lambda x: torch.nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class MegatronConfig:
    """All that is decided, once, for a recipe on a process's hardware, before a model is built.

    Attributes:
        overlaps: every overlap and fusion by its recipe key, and why it is on or off.
        transformer, data_parallel: what Megatron-Core is handed.
    """

    recipe: Recipe
    hardware: Hardware
    overlaps: Mapping[str, OverlapDecision]
    transformer: TransformerConfig
    data_parallel: DistributedDataParallelConfig


def megatron_config(
    recipe: Recipe, hardware: Hardware | None = None, data_size: int = 1
) -> MegatronConfig:
    """Decide for a recipe on this process's hardware (or the given one).

    Args:
        data_size: data-parallel ranks.

    Raises:
        UserError: FP8, context parallelism, an overlap or a fusion that this hardware cannot have,
            or a combination that Megatron-Core refuses (with its own words).
    """
    hardware = hardware or detect()
    _refuse(recipe, hardware)
    overlaps = decide_overlaps(recipe, hardware, data_size)
    on = {name: one.on for name, one in overlaps.items()}
    model_fields = transformer_fields(recipe, hardware, on)
    given, ddp = recipe.model.megatron, recipe.parallel.ddp
    with refusals("model", given, own_keys=True):
        transformer = TransformerConfig(**model_fields | with_types(TransformerConfig, given))
    with refusals("parallel.ddp", ddp):
        data_parallel = DistributedDataParallelConfig(**data_parallel_fields(recipe, on) | ddp)
    return MegatronConfig(recipe, hardware, overlaps, transformer, data_parallel)


@contextlib.contextmanager
def refusals(section: str, given: Mapping[str, Any], own_keys: bool = False) -> Iterator[None]:
    """Megatron-Core's refusals as sentences about a section of the recipe.

    Args:
        given: fields of Megatron-Core's own that the recipe has in that section.
        own_keys: a refusal may be about other keys too; else an error without `given` is a bug.
    """
    try:
        yield
    except (AssertionError, ValueError, TypeError) as error:
        if not given and not own_keys:
            raise
        words = next((line for line in str(error).splitlines() if line.strip()), "")
        if not words:  # it often asserts without any
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words = f"it wants `{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
        what = f"a field of it ({', '.join(given)})" if given else "this configuration"
        raise UserError(
            f"{section}: Megatron-Core refuses {what}: {words}; change what it names or take it out"
        ) from error


def with_types(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a recipe passes through to `kind`, with enum members and dtypes for their names.

    FP8 moments of Adam are bytes with a scale beside them.

    Upstream fault: Megatron-Core takes an enum member's name without a word, and for none of them.
    Versions: Megatron-Core 0.16 to 0.19.
    Remove when: its configuration classes turn names into members. Test: `test_names_of_members`.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    by_name = dict(zip(DTYPES, dtypes, strict=True))
    fields = {field.name: field for field in dataclasses.fields(kind)}

    def typed(name: str, value: Any) -> Any:
        field = fields.get(name)
        if field is None or not isinstance(value, str):
            return value
        if isinstance(field.default, Enum):
            return type(field.default)[value]
        return by_name[value] if field.type in (torch.dtype, "torch.dtype") else value

    return {name: typed(name, value) for name, value in given.items()}


def transformer_fields(
    recipe: Recipe, hardware: Hardware, speed: Mapping[str, bool]
) -> dict[str, Any]:
    """Fields of TransformerConfig, without those passed through by their own names.

    Args:
        speed: which overlaps and fusions are on.
    """
    model, parallel, precision = recipe.model, recipe.parallel, recipe.precision
    cuda = hardware.on_cuda
    half = precision.compute in ("bf16", "fp8")
    dtype = torch.bfloat16 if half else torch.float32
    fields: dict[str, Any] = dict(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.resolved_kv_heads,
        kv_channels=model.resolved_head_dim,
        ffn_hidden_size=model.stored_ffn_size(parallel.tensor),
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=model.gated,
        activation_func=_ACTIVATIONS[model.activation],
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias or model.linear_bias,
        rotary_interleaved=model.rotary_interleaved,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        softmax_scale=model.resolved_softmax_scale,
        # For matrices that `initialize_weights` does not know; it draws the rest anew.
        init_method_std=model.hidden_init_std,
        init_method=_normal(model.hidden_init_std),
        output_layer_init_method=_normal(model.residual_init_std),
        embedding_init_method=_normal(model.resolved_embedding_init_std),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        bf16=half,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        attention_softmax_in_fp32=True,
        # Losses are summed over micro-batches and ranks and divided once by the number of tokens:
        # independent of the layout.
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        batch_p2p_comm=cuda and not speed["pipeline"] and not two_stages_interleaved(parallel),
        batch_p2p_sync=False,  # makes the host wait; only torch before 1.11 needed it
        overlap_p2p_comm=speed["pipeline"],
        deallocate_pipeline_outputs=cuda,
        tp_comm_overlap=speed["tensor"],
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=speed["bias_dropout"],
        bias_activation_fusion=speed["activation"],
        apply_rope_fusion=speed["rope"],
        cross_entropy_loss_fusion=speed["cross_entropy"],
        cross_entropy_fusion_impl="te" if speed["cross_entropy"] else "native",
        # Without Apex: `workarounds.accumulate_in_products`.
        gradient_accumulation_fusion=speed["gradient_accumulation"] and hardware.apex_gradients,
        cuda_graph_impl="local" if speed["cuda_graphs"] else "none",
        use_te_rng_tracker=speed["cuda_graphs"],
    )
    if model.sliding_window:
        # Megatron-Core counts the tokens before the one that attends.
        fields |= dict(
            window_size=(model.sliding_window - 1, 0),
            window_attn_skip_freq=model.sliding_window_pattern,
        )
    if every := model.no_rope_layer_interval:
        fields |= dict(no_rope_freq=[int(i % every == 0) for i in range(1, model.layers + 1)])
    if MUP_IS_UPSTREAM and (model.embedding_scale, model.logit_scale) != (1.0, 1.0):
        # Megatron-Core's own base width stays the model's, so that it derives no factors itself.
        fields |= dict(
            use_mup=True,
            mup_embedding_mult=model.embedding_scale,
            mup_output_mult=model.logit_scale,
        )
    if parallel.recompute.granularity == "selective":
        fields |= dict(recompute_granularity="selective")
    elif parallel.recompute.granularity == "full":
        fields |= dict(
            recompute_granularity="full",
            recompute_method=parallel.recompute.method,
            recompute_num_layers=parallel.recompute.layers,
        )
    if precision.compute == "fp8":
        fields |= dict(
            fp8=precision.fp8_format,
            fp8_recipe=precision.fp8_recipe,
            fp8_amax_history_len=precision.fp8_amax_history,
            fp8_amax_compute_algo="max",
            fp8_param=precision.fp8_params,
            first_last_layers_bf16=bool(precision.bf16_first_layers or precision.bf16_last_layers),
            num_layers_at_start_in_bf16=precision.bf16_first_layers,
            num_layers_at_end_in_bf16=precision.bf16_last_layers,
        )
    return _known(TransformerConfig, fields)


def data_parallel_fields(recipe: Recipe, speed: Mapping[str, bool]) -> dict[str, Any]:
    """Fields of DistributedDataParallelConfig, likewise."""
    parallel, precision = recipe.parallel, recipe.precision
    fp8_params = precision.compute == "fp8" and precision.fp8_params
    fields = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=speed["grad_reduce"],
        overlap_param_gather=speed["param_gather"],
        # All stages of an interleaved pipeline gather at once, so that none waits for a slower one.
        # The plain schedule (1F1B) has no place where it would start that.
        align_param_gather=speed["param_gather"] and parallel.virtual_pipeline is not None,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
        fp8_param_gather=fp8_params,
        # mxfp8 weights have two layouts, and what is gathered needs a buffer: the gradients', which
        # is idle then. The optimizer is told the same (`optimizer_fields`).
        reuse_grad_buf_for_mxfp8_param_ag=precision.mxfp8_params,
    )
    return _known(DistributedDataParallelConfig, fields)


def _refuse(recipe: Recipe, hardware: Hardware) -> None:
    precision, parallel = recipe.precision, recipe.parallel
    if precision.compute == "fp8" and (why := fp8_refusal(precision.fp8_recipe, hardware)):
        raise UserError(
            f"precision: fp8 cannot run here: {why}; use `precision: bf16`, or what is missing "
            "(`megacode doctor` says how to get it)"
        )
    given = recipe.model.megatron
    modules = given.get("recompute_modules") or ()
    wants = [
        name for name in ("cpu_offloading", "fine_grained_activation_offloading") if given.get(name)
    ]
    wants += ["recompute_modules: [layernorm]"] if "layernorm" in modules else []
    if wants and hardware.engine is None:
        raise UserError(
            f"model.megatron.{wants[0]}: needs Transformer Engine on CUDA devices, and there is "
            "none here; take it out (`megacode doctor` says how to install it)"
        )
    if parallel.context > 1 and hardware.engine is None:
        missing = "has no Transformer Engine" if hardware.on_cuda else "shows no CUDA device"
        raise UserError(
            f"parallel.context: {parallel.context} needs Transformer Engine's attention on CUDA "
            f"devices, and this machine {missing}; set it to 1 (parallel.tensor or "
            "parallel.pipeline split a model too) or install it (`megacode doctor` says how)"
        )


def _normal(std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.nn.init.normal_(tensor, mean=0.0, std=std)


def _known(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without those that are off and that the installed version does not have."""
    there = kind.__dataclass_fields__
    return {
        name: value for name, value in fields.items() if name in there or value not in (False, None)
    }
