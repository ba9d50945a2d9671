"""Fields of Megatron-Core's own configurations that a recipe passes through, checked without importing Megatron-Core.

Names and types stand in `megatron_fields.json`, which `tools/megatron-fields` prints from one version and a test keeps true.
Where another version is installed, names that the table does not have are left for Megatron-Core to judge when a run starts.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from megacode.recipe.compose import did_you_mean
from megacode.recipe.schema import Recipe
from megacode.recipe.yaml_tree import describe

# What a recipe key (or megacode itself) sets: the key to use instead, or why the field is not free.
_MODEL_GOVERNED = {
    "num_layers": "model.layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.heads",
    "num_query_groups": "model.kv_heads",
    "kv_channels": "model.head_dim",
    "ffn_hidden_size": "model.ffn_size",
    "normalization": "model.normalization",
    "layernorm_epsilon": "model.norm_epsilon",
    "qk_layernorm": "model.qk_norm",
    "gated_linear_unit": "model.activation",
    "activation_func": "model.activation",
    "add_bias_linear": "model.linear_bias",
    "add_qkv_bias": "model.qkv_bias",
    "rotary_interleaved": "model.rotary_interleaved",
    "hidden_dropout": "model.dropout",
    "attention_dropout": "model.attention_dropout",
    "softmax_scale": "model.softmax_scale",
    "init_method_std": "model.init_std",
    "init_method": "model.init_std",
    "output_layer_init_method": "model.output_init_std",
    "embedding_init_method": "model.embedding_init_std",
    "embedding_init_method_std": "model.embedding_init_std",
    "use_mup": "model.mup",
    "mup_width_mult": "model.mup.base_hidden_size",
    "mup_base_hidden_size": "model.mup.base_hidden_size",
    "mup_embedding_mult": "model.mup.embedding_scale",
    "mup_output_mult": "model.mup.output_alpha",
    "mup_base_head_dim": "model.softmax_scale",
    "mup_attn_scale_power": "model.softmax_scale",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "recompute_granularity": "parallel.recompute.granularity",
    "recompute_method": "parallel.recompute.method",
    "recompute_num_layers": "parallel.recompute.layers",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "params_dtype": "precision.compute",
    "pipeline_dtype": "precision.compute",
    "autocast_dtype": "precision.compute",
    "fp8": "precision.fp8_format",
    "fp8_recipe": "precision.fp8_recipe",
    "fp8_amax_history_len": "precision.fp8_amax_history",
    "fp8_param": "precision.fp8_params",
    "first_last_layers_bf16": "precision.bf16_first_layers",
    "num_layers_at_start_in_bf16": "precision.bf16_first_layers",
    "num_layers_at_end_in_bf16": "precision.bf16_last_layers",
    "calculate_per_token_loss": "optimizer.loss_denominator",
    "tp_comm_overlap": "parallel.overlap.tensor",
    "overlap_p2p_comm": "parallel.overlap.pipeline",
    "batch_p2p_comm": "parallel.overlap.pipeline",
    "apply_rope_fusion": "fusion.rope",
    "cross_entropy_loss_fusion": "fusion.cross_entropy",
    "cross_entropy_fusion_impl": "fusion.cross_entropy",
    "bias_activation_fusion": "fusion.activation",
    "bias_dropout_fusion": "fusion.bias_dropout",
    "gradient_accumulation_fusion": "fusion.gradient_accumulation",
    "cuda_graph_impl": "fusion.cuda_graphs",
    "enable_cuda_graph": "fusion.cuda_graphs",
    "external_cuda_graph": "fusion.cuda_graphs",
    "use_te_rng_tracker": "fusion.cuda_graphs",
}
_OPTIMIZER_GOVERNED = {
    "lr": "phases.NAME.learning_rate.peak",
    "min_lr": "phases.NAME.learning_rate.final",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_grad",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "params_dtype": "precision.compute",
    "fp8_recipe": "precision.fp8_recipe",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.fp8_params",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_param_gather": "parallel.overlap.param_gather",
}
DTYPES = ("fp32", "bf16", "fp16", "fp8")
"""What a recipe calls a field's torch.dtype, as Megatron-LM's own options do."""
_DDP_GOVERNED = {
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "fp8_param_gather": "precision.fp8_params",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.fp8_params",
    "overlap_grad_reduce": "parallel.overlap.grad_reduce",
    "overlap_param_gather": "parallel.overlap.param_gather",
}

# What Megatron-Core would take and ignore, or fail at later, since megacode does not build what it is for; shell patterns.
_OTHER_LAYERS = "belongs to layers of another kind than megacode's, which are dense with standard attention; take it out"
_MODEL_REFUSED = dict.fromkeys(
    (
        "num_moe_experts", "moe_*", "*moe_expert_parallel*", "expert_*_parallel_size", "ep_overlap_*",
        "multi_latent_attention", "qk_l2_norm", "experimental_attention_variant", "dsa_*", "linear_attention_*", "linear_*_dim",
        "linear_num_*", "mtp_*", "heterogeneous_*", "hetereogenous_*", "is_hybrid_model", "mamba_*", "use_mamba_*", "mrope_*",
        "use_kitchen*", "kitchen_*", "use_te_activation_func", "use_fused_weighted_squared_relu", "transformer_impl",
    ),
    _OTHER_LAYERS,
)  # fmt: skip
_OPTIMIZER_REFUSED = {
    "optimizer": "rates, groups and checkpoints here are AdamW's, the only optimizer; take it out",
}
_DDP_REFUSED = {
    "num_distributed_optimizer_instances": "needs groups of ranks that megacode does not make; take it out",
    "use_*_fsdp": "needs another wrapper than DistributedDataParallel, which is megacode's; take it out",
}


def check_pass_through(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, sentence) for every pass-through field that Megatron-Core has not, that another key governs, that would have no
    effect, or of a wrong type."""
    sections = (
        (
            "model.megatron",
            recipe.model.megatron,
            _MODEL_GOVERNED,
            _MODEL_REFUSED,
            "TransformerConfig",
        ),
        (
            "optimizer.megatron",
            recipe.optimizer.megatron,
            _OPTIMIZER_GOVERNED,
            _OPTIMIZER_REFUSED,
            "OptimizerConfig",
        ),
        (
            "parallel.ddp",
            recipe.parallel.ddp,
            _DDP_GOVERNED,
            _DDP_REFUSED,
            "DistributedDataParallelConfig",
        ),
    )
    for section, given, governed, refused, kind in sections:
        for name, value in given.items():
            key, known = f"{section}.{name}", fields_of(kind)
            if name in governed:
                yield key, f"is what `{governed[name]}` sets; use that key"
            elif value not in (None, False) and (why := _refusal(name, refused)):
                yield key, why
            elif name in known:
                if problem := _type_problem(known[name], value):
                    yield key, problem
            elif _is_the_tables_version():
                hint = did_you_mean(name, [field for field in known if field not in governed])
                shown = (
                    hint
                    if hint.startswith("; did")
                    else "; its field names are in the class's source"
                )
                yield key, f"Megatron-Core's {kind} has no such field{shown}"


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return dict(
        json.loads(Path(__file__).with_name("megatron_fields.json").read_text(encoding="utf-8"))
    )


def fields_of(kind: str) -> dict[str, dict[str, Any]]:
    """Fields of one of Megatron-Core's dataclasses by name: `declared` type, what it `accepts` (null: Megatron-Core judges),
    `choices`, `nullable`."""
    return dict(_table()[kind])


def _is_the_tables_version() -> bool:
    """Whether the installed Megatron-Core is the table's version, or none is installed."""
    try:
        return metadata.version("megatron-core") == _table()["version"]
    except metadata.PackageNotFoundError:
        return True


def _refusal(name: str, refused: Mapping[str, str]) -> str | None:
    return next(
        (why for pattern, why in refused.items() if fnmatch.fnmatchcase(name, pattern)), None
    )


def _type_problem(field: Mapping[str, Any], value: Any) -> str | None:
    accepts, choices = field["accepts"], field.get("choices", [])
    if accepts is None or (value is None and field.get("nullable")):
        return None
    kind = type(value).__name__
    if value in choices or kind in accepts or (kind == "int" and "float" in accepts):
        return None
    wanted = " or ".join([*map(repr, choices), *accepts])
    return f"expected {wanted} (Megatron-Core declares {field['declared']}), not {describe(value)}; change the value"
