"""Fields of Megatron-Core's own configurations that a recipe passes through, checked without
importing Megatron-Core.

`megatron_fields.json` holds names and types; `tools/megatron-fields` prints it from one version and
a test keeps it true. Every field of TransformerConfig has a place here: another key sets it
(`GOVERNED`), a recipe may set it (`EFFECT`), or it is refused (`REFUSED`). Where another version is
installed, Megatron-Core judges names of its other two classes that the table does not have, when a
run starts.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megacode.recipe.compose import did_you_mean
from megacode.recipe.schema import Recipe
from megacode.recipe.yaml_tree import describe

DTYPES = ("fp32", "bf16", "fp16", "fp8")
"""What a recipe calls a field's torch.dtype, as Megatron-LM's own options do."""

# Key of a recipe: the fields that it sets (or that megacode sets because of it).
_SET_BY = {
    "model.layers": "num_layers",
    "model.hidden_size": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_query_groups",
    "model.head_dim": "kv_channels",
    "model.ffn_size": "ffn_hidden_size",
    "model.normalization": "normalization",
    "model.norm_epsilon": "layernorm_epsilon",
    "model.qk_norm": "qk_layernorm",
    "model.activation": "gated_linear_unit activation_func",
    "model.linear_bias": "add_bias_linear",
    "model.qkv_bias": "add_qkv_bias",
    "model.rotary_interleaved": "rotary_interleaved",
    "model.no_rope_layer_interval": "no_rope_freq",
    "model.sliding_window": "window_size",
    "model.sliding_window_pattern": "window_attn_skip_freq",
    "model.dropout": "hidden_dropout",
    "model.attention_dropout": "attention_dropout",
    "model.softmax_scale": "softmax_scale mup_base_head_dim mup_attn_scale_power",
    "model.init_std": "init_method_std init_method",
    "model.output_init_std": "output_layer_init_method",
    "model.embedding_init_std": "embedding_init_method embedding_init_method_std",
    "model.mup": "use_mup",
    "model.mup.base_hidden_size": "mup_width_mult mup_base_hidden_size",
    "model.mup.embedding_scale": "mup_embedding_mult",
    "model.mup.output_alpha": "mup_output_mult",
    "parallel.tensor": "tensor_model_parallel_size",
    "parallel.pipeline": "pipeline_model_parallel_size",
    "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "parallel.context": "context_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "parallel.recompute.granularity": "recompute_granularity",
    "parallel.recompute.method": "recompute_method",
    "parallel.recompute.layers": "recompute_num_layers",
    "precision.compute": "fp16 bf16 params_dtype pipeline_dtype autocast_dtype",
    "precision.fp8_format": "fp8",
    "precision.fp8_recipe": "fp8_recipe",
    "precision.fp8_amax_history": "fp8_amax_history_len",
    "precision.fp8_params": "fp8_param reuse_grad_buf_for_mxfp8_param_ag fp8_param_gather",
    "precision.bf16_first_layers": "first_last_layers_bf16 num_layers_at_start_in_bf16",
    "precision.bf16_last_layers": "num_layers_at_end_in_bf16",
    "optimizer.loss_denominator": "calculate_per_token_loss",
    "parallel.overlap.tensor": "tp_comm_overlap",
    "parallel.overlap.pipeline": "overlap_p2p_comm batch_p2p_comm",
    "fusion.rope": "apply_rope_fusion",
    "fusion.cross_entropy": "cross_entropy_loss_fusion cross_entropy_fusion_impl",
    "fusion.activation": "bias_activation_fusion",
    "fusion.bias_dropout": "bias_dropout_fusion",
    "fusion.gradient_accumulation": "gradient_accumulation_fusion",
    "fusion.cuda_graphs": """
        cuda_graph_impl enable_cuda_graph external_cuda_graph use_te_rng_tracker
    """,
    "phases.NAME.learning_rate.peak": "lr",
    "phases.NAME.learning_rate.final": "min_lr",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.epsilon": "adam_eps",
    "optimizer.clip_grad": "clip_grad",
    "parallel.distributed_optimizer": "use_distributed_optimizer",
    "parallel.overlap.param_gather": "overlap_param_gather",
    "parallel.overlap.grad_reduce": "overlap_grad_reduce",
}
GOVERNED = {field: key for key, fields in _SET_BY.items() for field in fields.split()}
"""Field: the recipe key to use instead."""

Effect = Literal["layout", "training", "function"]
_EFFECTS: dict[Effect, str] = {
    "layout": """
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        attention_backend clone_scatter_output_in_embedding config_logger_dir cp_comm_type
        cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering
        cpu_offloading_num_layers cpu_offloading_weights cuda_graph_retain_backward_graph
        cuda_graph_warmup_steps deallocate_pipeline_outputs defer_embedding_wgrad_compute
        deterministic_mode disable_parameter_transpose_cache distribute_saved_activations
        fine_grained_activation_offloading microbatch_group_size_per_vp_stage
        min_offloaded_tensor_size num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage offload_modules overlap_p2p_comm_warmup_flush
        pipeline_model_parallel_layout recompute_modules tp_comm_bulk_dgrad tp_comm_bulk_wgrad
        tp_comm_overlap_ag tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv
        tp_comm_overlap_rs tp_comm_overlap_rs_dgrad wgrad_deferral_limit
    """,
    "training": """
        activation_func_fp8_input_store fp8_amax_compute_algo fp8_dot_product_attention fp8_margin
        fp8_multi_head_attention fp8_wgrad tp_only_amax_red
    """,
    "function": "layernorm_zero_centered_gamma softmax_type",
}
EFFECT: dict[str, Effect] = {f: effect for effect, text in _EFFECTS.items() for f in text.split()}
"""The fields of TransformerConfig that a recipe may set, by what they change.

* *layout*: memory, speed, which rank computes what. May change when a run goes on.
* *training*: numbers of the training steps alone (FP8). A fact of the past; exports ignore it.
* *function*: what the model computes from its weights. A fact of the past; exports refuse it.
"""

_WHY = {
    "belongs to other layers than megacode's, which are dense with standard attention": """
        num_moe_experts moe_* *moe_expert_parallel* expert_*_parallel_size ep_overlap_*
        multi_latent_attention qk_l2_norm experimental_attention_variant dsa_* linear_attention_*
        linear_*_dim linear_num_* mtp_* heterogeneous_* hetereogenous_* is_hybrid_model mamba_*
        use_mamba_* mrope_* use_kitchen* kitchen_* use_te_activation_func
        use_fused_weighted_squared_relu transformer_impl delay_wgrad_compute
        attention_output_gate glu_linear_offset activation_func_clamp_value
    """,
    "belongs to Megatron-Core's inference engine, which megacode does not use": """
        *inference* flash_decode mlp_chunks_for_prefill symmetric_ar_type
    """,
    "has no effect on what megacode runs": """
        apply_query_key_layer_scaling apply_residual_connection_post_layernorm
        async_tensor_model_parallel_allreduce barrier_with_L1_time
        cuda_graph_scope cuda_graph_use_single_mempool disable_bf16_reduced_precision_matmul
        fp8_interval init_model_with_meta_device log_max_attention_logit
        memory_efficient_layer_norm persist_layer_norm pipeline_model_parallel_comm_backend qk_clip*
        test_mode timers tp_comm_atomic_* tp_comm_bootstrap_backend tp_comm_split_*
    """,
    "is megacode's to set": """
        attention_softmax_in_fp32 batch_p2p_sync enable_autocast perform_initialization
        use_cpu_initialization finalize_model_grads_func grad_scale_func *_sync_func
    """,
    "needs groups of ranks that megacode does not make": """
        hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank
        num_distributed_optimizer_instances
    """,
    "fails with megacode's layers or loop": """
        batch_invariant_mode fp32_residual_connection fused_single_qkv_rope use_ring_exchange_p2p
        variable_seq_lengths num_microbatches_with_partial_activation_checkpoints
    """,
    "would drop document boundaries without a word": "masked_softmax_fusion",
    "is a precision that megacode does not have": "fp4* fp8_quantizer_factory quant_recipe",
    "needs another wrapper than DistributedDataParallel, which is megacode's": "use_*_fsdp",
    "would replace AdamW, whose rates, groups and checkpoints are the only ones here": "optimizer",
}
REFUSED = {pattern: why for why, patterns in _WHY.items() for pattern in patterns.split()}
"""Shell patterns of fields that Megatron-Core would ignore, or fail at later: why. `null` passes,
which takes a field out again."""


def check_pass_through(recipe: Recipe) -> Iterator[str]:
    """A problem for every field that is unknown, that another key sets, that would have no effect
    or fail, or whose type is wrong."""
    sections = (
        ("model.megatron", recipe.model.megatron, "TransformerConfig"),
        ("optimizer.megatron", recipe.optimizer.megatron, "OptimizerConfig"),
        ("parallel.ddp", recipe.parallel.ddp, "DistributedDataParallelConfig"),
    )
    for section, given, kind in sections:
        for name, value in given.items():
            if problem := _problem(recipe, kind, name, value):
                yield f"{section}.{name}: {problem}"


def _problem(recipe: Recipe, kind: str, name: str, value: Any) -> str | None:
    if name in GOVERNED:
        return f"is what `{GOVERNED[name]}` sets; use that key"
    if value is None:
        return None
    for pattern, why in REFUSED.items():
        if fnmatch.fnmatchcase(name, pattern):
            return f"{why}; take it out"
    known = fields_of(kind)
    if name in known:
        if EFFECT.get(name) == "training" and recipe.precision.compute != "fp8":
            return "has no effect without `precision: fp8`; take it out or change the precision"
        return _type_problem(known[name], value)
    if kind != "TransformerConfig" and not _is_the_tables_version():
        return None
    hint = did_you_mean(name, [field for field in known if field not in GOVERNED])
    near = "did you mean" in hint
    return (
        f"is no field of Megatron-Core's {kind} that megacode knows"
        f"{hint if near else '; its source has the names'}"
    )


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("megatron_fields.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def fields_of(kind: str) -> dict[str, dict[str, Any]]:
    """Fields of one of Megatron-Core's dataclasses by name: `declared` type, what it `accepts`
    (null: Megatron-Core judges), `choices`, `nullable`."""
    return dict(_table()[kind])


def _is_the_tables_version() -> bool:
    """Whether the installed Megatron-Core is the table's version, or none is installed."""
    try:
        return metadata.version("megatron-core") == _table()["version"]
    except metadata.PackageNotFoundError:
        return True


def _type_problem(field: Mapping[str, Any], value: Any) -> str | None:
    accepts, choices = field["accepts"], field.get("choices", [])
    if accepts is None or (value is None and field.get("nullable")):
        return None
    kind = type(value).__name__
    if isinstance(value, dict):
        kind = "dict"
    if value in choices or kind in accepts or (kind == "int" and "float" in accepts):
        return None
    wanted = " or ".join([*map(repr, choices), *accepts])
    wanted = f"{wanted} (Megatron-Core declares {field['declared']})"
    return f"expected {wanted}, not {describe(value)}; change the value"
