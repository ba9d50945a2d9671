"""What Megatron-Core is handed, field by field, on hardware that need not be here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megacode.plan.hardware import Hardware, assumed
from megacode.recipe.load import load_recipe
from tests.processes import run_on

RECIPES = Path(__file__).parents[2] / "recipes"
H100, H200, B200 = assumed("h100"), assumed("h200"), assumed("b200")
ENGINE_ONLY = Hardware("NVIDIA H100", (9, 0), (13, 0), (2, 12, 0))

# name: (recipe, hardware, data-parallel ranks, changes)
CASES: dict[str, tuple[str, Hardware, int, list[str]]] = {
    "crystal-7b": ("crystal-7b", H100, 16, ["parallel={pipeline: 1}"]),
    "crystal-7b cpu": ("crystal-7b", Hardware(), 1, ["parallel={pipeline: 1}"]),
    "no apex": ("crystal-7b", ENGINE_ONLY, 1, ["parallel={pipeline: 1}"]),
    "pipelined": ("crystal-7b", H100, 2, ["parallel={pipeline: 4, virtual_pipeline: 2, tensor: 2, sequence: true}"]),
    "two stages": ("crystal-7b", H100, 2, ["parallel={pipeline: 2, virtual_pipeline: 2, overlap: {pipeline: false}}"]),
    "delayed": ("crystal-7b", H200, 2, ["precision=fp8"]),
    "tensorwise": ("crystal-7b", H200, 2, [
        "precision={compute: fp8, fp8_recipe: tensorwise, bf16_first_layers: 1, bf16_last_layers: 2}"]),
    "blockwise": ("crystal-7b", H200, 2, ["precision={compute: fp8, fp8_recipe: blockwise, fp8_params: true}"]),
    "mxfp8": ("crystal-7b", B200, 2, ["precision={compute: fp8, fp8_recipe: mxfp8, fp8_params: true, fp8_format: e4m3}"]),
    "recomputed": ("crystal-7b", H100, 1, ["parallel={recompute: {granularity: full, method: block, layers: 3}}"]),
    "selective": ("crystal-7b", H100, 1, ["parallel={recompute: selective}"]),
    "graphs": ("crystal-7b", H100, 1, ["fusion={cuda_graphs: true}"]),
    "fused nothing": ("crystal-7b", H100, 2, [
        "fusion={rope: false, cross_entropy: false, activation: false, bias_dropout: false, gradient_accumulation: false}",
        "parallel.overlap={grad_reduce: false}"]),
}  # fmt: skip


def handed(
    world: Any, cases: dict[str, tuple[str, Hardware, int, list[str]]]
) -> dict[str, tuple[dict, dict, dict]]:
    """Of every case the three dictionaries, with functions and dtypes by name; each is also built, so that Megatron-Core
    agrees (but for the fused rotary positions, which want Transformer Engine at once)."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from megacode.megatron.config import data_parallel_fields, transformer_fields
    from megacode.megatron.optimizer import optimizer_fields
    from megacode.plan.overlap import decide_overlaps

    def plain(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            k: getattr(v, "__name__", str(v)) if callable(v) or "dtype" in k else v
            for k, v in fields.items()
        }

    out = {}
    for name, (recipe_name, hardware, data, changes) in cases.items():
        recipe = load_recipe(RECIPES / f"{recipe_name}.yaml", changes)
        on = {name: one.on for name, one in decide_overlaps(recipe, hardware, data).items()}
        model = transformer_fields(recipe, hardware, on)
        ddp = data_parallel_fields(recipe, on)
        optimizer = optimizer_fields(recipe, ddp["overlap_param_gather"])
        TransformerConfig(**(model | {"apply_rope_fusion": False}))
        DistributedDataParallelConfig(**ddp)
        OptimizerConfig(**optimizer)
        out[name] = plain(model), plain(ddp), plain(optimizer)
    return out


@pytest.fixture(scope="module")
def all_handed() -> dict[str, tuple[dict, dict, dict]]:
    return run_on(1, handed, CASES)[0]


CRYSTAL = dict(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, kv_channels=128,
    ffn_hidden_size=11008,  # 10,922 with zeros up to a multiple of 128
    normalization="LayerNorm", layernorm_epsilon=1e-5, qk_layernorm=False, gated_linear_unit=True, activation_func="silu",
    add_bias_linear=True, add_qkv_bias=True, rotary_interleaved=True, hidden_dropout=0.0, attention_dropout=0.0,
    softmax_scale=1 / 128, init_method_std=0.073 / 16**0.5, init_method="<lambda>", output_layer_init_method="<lambda>",
    embedding_init_method="<lambda>", tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None, context_parallel_size=1, sequence_parallel=False, bf16=True,
    params_dtype="torch.bfloat16", pipeline_dtype="torch.bfloat16", autocast_dtype="torch.bfloat16",
    attention_softmax_in_fp32=True, calculate_per_token_loss=True, use_cpu_initialization=False, batch_p2p_comm=True,
    batch_p2p_sync=False, overlap_p2p_comm=False, deallocate_pipeline_outputs=True, tp_comm_overlap=False,
    persist_layer_norm=False, masked_softmax_fusion=False, bias_dropout_fusion=True, bias_activation_fusion=True,
    apply_rope_fusion=True, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te",
    gradient_accumulation_fusion=True, cuda_graph_impl="none", use_te_rng_tracker=False,
)  # fmt: skip
CRYSTAL_DDP = dict(
    grad_reduce_in_fp32=True, overlap_grad_reduce=True, overlap_param_gather=True, align_param_gather=False,
    use_distributed_optimizer=True, check_for_nan_in_grad=False, fp8_param_gather=False,
    reuse_grad_buf_for_mxfp8_param_ag=False,
)  # fmt: skip
CRYSTAL_ADAM = dict(
    optimizer="adam", lr=0.012, min_lr=0.0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-9, clip_grad=1.0,
    bf16=True, params_dtype="torch.bfloat16", use_distributed_optimizer=True, overlap_param_gather=True, fp8_recipe=None,
    reuse_grad_buf_for_mxfp8_param_ag=False, store_param_remainders=True,
)  # fmt: skip
ON_CPU = dict(
    use_cpu_initialization=True, batch_p2p_comm=False, deallocate_pipeline_outputs=False, bias_dropout_fusion=False,
    bias_activation_fusion=False, apply_rope_fusion=False, cross_entropy_loss_fusion=False,
    cross_entropy_fusion_impl="native", gradient_accumulation_fusion=False,
)  # fmt: skip
FP8 = dict(
    fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=1024, fp8_amax_compute_algo="max", fp8_param=False,
    first_last_layers_bf16=False, num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=0,
)  # fmt: skip


def without_own_mup(fields: dict[str, Any]) -> dict[str, Any]:
    """muP's factors are fields from Megatron-Core 0.17 on; `test_mup` has their numbers."""
    return {name: value for name, value in fields.items() if "mup" not in name}


def test_crystal_on_many_gpus(all_handed: dict) -> None:
    model, ddp, optimizer = all_handed["crystal-7b"]
    assert without_own_mup(model) == CRYSTAL
    assert ddp == CRYSTAL_DDP
    assert optimizer == CRYSTAL_ADAM


def test_crystal_on_a_cpu(all_handed: dict) -> None:
    model, ddp, optimizer = all_handed["crystal-7b cpu"]
    assert without_own_mup(model) == CRYSTAL | ON_CPU
    assert ddp == CRYSTAL_DDP | dict(overlap_grad_reduce=False, overlap_param_gather=False)
    assert optimizer == CRYSTAL_ADAM | dict(overlap_param_gather=False)


# What differs from crystal-7b on many GPUs: (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
ALONE = dict(overlap_grad_reduce=False, overlap_param_gather=False)
GATHERED = dict(overlap_param_gather=False)
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # Without Apex Megatron-Core's key stays off and the layers are told themselves.
    "no apex": (dict(gradient_accumulation_fusion=False), ALONE, GATHERED),
    "pipelined": (
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2,
             sequence_parallel=True, batch_p2p_comm=False, overlap_p2p_comm=True, tp_comm_overlap=True),
        dict(align_param_gather=True), {},
    ),
    # The stage before is also the one behind: a batched exchange would swap messages.
    "two stages": (dict(batch_p2p_comm=False), dict(align_param_gather=True), {}),
    "recomputed": (dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3), ALONE, GATHERED),
    "selective": (dict(recompute_granularity="selective"), ALONE, GATHERED),
    "graphs": (dict(cuda_graph_impl="local", use_te_rng_tracker=True), ALONE, GATHERED),
    "fused nothing": (
        {k: v for k, v in ON_CPU.items() if "fusion" in k}, ALONE, GATHERED,
    ),
    "delayed": (FP8, {}, dict(fp8_recipe="delayed")),
    "tensorwise": (
        FP8 | dict(fp8_recipe="tensorwise", first_last_layers_bf16=True, num_layers_at_start_in_bf16=1,
                   num_layers_at_end_in_bf16=2), {}, dict(fp8_recipe="tensorwise"),
    ),
    "blockwise": (
        FP8 | dict(fp8_recipe="blockwise", fp8_param=True), dict(fp8_param_gather=True),
        dict(fp8_recipe="blockwise", store_param_remainders=False),
    ),
    "mxfp8": (
        FP8 | dict(fp8="e4m3", fp8_recipe="mxfp8", fp8_param=True),
        # Gathered at once: Megatron-Core leaves it to the training loop to fill the shared buffer for a later gather.
        dict(fp8_param_gather=True, reuse_grad_buf_for_mxfp8_param_ag=True, overlap_param_gather=False),
        dict(fp8_recipe="mxfp8", store_param_remainders=False, reuse_grad_buf_for_mxfp8_param_ag=True,
             overlap_param_gather=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_a_key_changes_and_nothing_else(case: str, all_handed: dict) -> None:
    model, ddp, optimizer = all_handed[case]
    changed = load_recipe(RECIPES / "crystal-7b.yaml", CASES[case][3]).parallel
    layout = dict(
        tensor_model_parallel_size=changed.tensor, pipeline_model_parallel_size=changed.pipeline,
        virtual_pipeline_model_parallel_size=changed.virtual_pipeline,
    )  # fmt: skip
    expected = DIFFERENT[case]
    assert without_own_mup(model) == CRYSTAL | layout | expected[0]
    assert ddp == CRYSTAL_DDP | expected[1]
    assert optimizer == CRYSTAL_ADAM | expected[2]


def test_userbuffers_have_the_shape_of_a_micro_batch() -> None:
    from megacode.megatron.hardware import userbuffer_arguments as arguments

    class Modes:
        FP8, NONE = "fp8", "none"

    layout = "parallel={tensor: 4, sequence: true, micro_batch_size: 2}"
    recipe = load_recipe(RECIPES / "crystal-7b.yaml", [layout])
    assert arguments(recipe, Modes) == dict(
        shape=[4096, 4096], tp_size=4, quantization_modes=["none"], bootstrap_backend="nccl"
    )
    fp8 = "precision={compute: fp8, fp8_recipe: tensorwise, bf16_last_layers: 1}"
    assert arguments(load_recipe(RECIPES / "crystal-7b.yaml", [layout, fp8]), Modes)[
        "quantization_modes"
    ] == [
        "fp8",
        "none",
    ]
    plain = load_recipe(RECIPES / "crystal-7b.yaml", [layout, "precision=fp8"])
    assert arguments(plain, Modes)["quantization_modes"] == ["fp8"]


def test_hardware_is_plain_data() -> None:
    """It travels to other processes, and a recipe's plan makes it up."""
    assert dataclasses.asdict(H100)["capability"] == (9, 0)
    assert not Hardware().on_cuda
