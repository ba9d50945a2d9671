"""A training loop against Megatron-Core alone: what megacode's own loop is measured against.

GPTModel, DistributedDataParallel, its optimizer and schedule, batches ready in memory; no metrics, no loader, no checks. On a
machine without CUDA it shares the redirection that lets Megatron-Core run there at all.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np


def settings_of(recipe: Any, vocab_size: int) -> dict[str, Any]:
    """What the bare loop needs to know of a recipe, as JSON-able data."""
    from megacode.launch import free_port

    model, precision = recipe.model, recipe.precision
    return dict(
        layers=model.layers, hidden_size=model.hidden_size, heads=model.heads, kv_heads=model.resolved_kv_heads,
        head_dim=model.resolved_head_dim, ffn_size=model.stored_ffn_size(1), linear_bias=model.linear_bias,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.normalization], gated=model.gated,
        rotary_interleaved=model.rotary_interleaved, rotary_fraction=model.rotary_fraction, tied=model.tie_embeddings,
        half=precision.compute != "fp32", fp8=precision.fp8_recipe if precision.compute == "fp8" else None,
        fp8_format=precision.fp8_format, fp8_history=precision.fp8_amax_history, fp8_params=precision.fp8_params,
        lean=bool(recipe.optimizer.megatron.get("use_precision_aware_optimizer")),
        accumulate=recipe.fusion.gradient_accumulation is not False,
        recompute=recipe.parallel.recompute.model_dump(), vocab=model.stored(vocab_size, 1),
        length=recipe.phases[0].sequence_length, micro_batch_size=recipe.parallel.micro_batch_size, port=free_port(),
    )  # fmt: skip


def bare(m: dict[str, Any], batches: np.ndarray) -> list[float]:
    """Seconds of each step; `batches` is int64 [steps, batch size, sequence length + 1], `m` as of `settings_of`."""
    import torch

    if not torch.cuda.is_available():
        from megacode.megatron import cpu

        cpu.install()
        cpu.quiet()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    cuda = torch.cuda.is_available()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(m["port"])}
    torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    device = torch.device("cuda" if cuda else "cpu")
    half = m["half"]
    dtype = torch.bfloat16 if half else torch.float32
    try:
        import transformer_engine.pytorch  # noqa: F401

        engine = cuda
    except ImportError:
        engine = False
    config = TransformerConfig(
        num_layers=m["layers"], hidden_size=m["hidden_size"], num_attention_heads=m["heads"],
        num_query_groups=m["kv_heads"], kv_channels=m["head_dim"], ffn_hidden_size=m["ffn_size"],
        normalization=m["normalization"], gated_linear_unit=m["gated"], activation_func=torch.nn.functional.silu,
        add_bias_linear=m["linear_bias"], hidden_dropout=0.0, attention_dropout=0.0, bf16=half, params_dtype=dtype,
        pipeline_dtype=dtype, attention_softmax_in_fp32=True, use_cpu_initialization=not cuda,
        rotary_interleaved=m["rotary_interleaved"], bias_dropout_fusion=cuda, bias_activation_fusion=cuda,
        apply_rope_fusion=engine, cross_entropy_loss_fusion=engine, cross_entropy_fusion_impl="te" if engine else "native",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=cuda and m["accumulate"] and tensor_parallel.layers._grad_accum_fusion_available,
        **(
            dict(
                fp8=m["fp8_format"], fp8_recipe=m["fp8"], fp8_amax_history_len=m["fp8_history"], fp8_amax_compute_algo="max",
                fp8_param=m["fp8_params"],
            )
            if m["fp8"]
            else {}
        ),
        **(
            dict(
                recompute_granularity="full", recompute_method=m["recompute"]["method"],
                recompute_num_layers=m["recompute"]["layers"],
            )
            if m["recompute"]["granularity"] == "full"
            else {}
        ),
    )  # fmt: skip
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if engine
        else get_gpt_layer_local_spec(normalization=config.normalization)
    )
    model = GPTModel(
        config, spec, m["vocab"], m["length"], share_embeddings_and_output_weights=m["tied"], position_embedding_type="rope",
        rotary_percent=m["rotary_fraction"],
    ).to(device)  # fmt: skip
    if half:
        model = model.bfloat16()
    if engine and m["accumulate"] and not config.gradient_accumulation_fusion:
        # Without Apex Megatron-Core's own key is refused, by the output layer alone; the other layers do not need it.
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        fp8_param_gather=bool(m["fp8"] and m["fp8_params"]),
    )
    model = DistributedDataParallel(config, data_parallel, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0, bf16=half, params_dtype=dtype,
            use_distributed_optimizer=True, fp8_recipe=m["fp8"], use_precision_aware_optimizer=m["lean"],
        ),
        [model],
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    def forward(iterator, model):  # type: ignore[no-untyped-def]
        window = next(iterator)
        tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        losses = model(tokens, positions, None, labels=labels)
        return losses, lambda output: (
            output.float().sum(),
            torch.tensor(output.numel(), dtype=torch.int, device=device),
            {"loss": output.detach().float().mean()},
        )

    schedule = get_forward_backward_func()
    windows = [torch.from_numpy(w).to(device) for w in batches]
    micro = m["micro_batch_size"]
    seconds = []
    for window in windows:
        started = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        parts = window.split(micro)
        schedule(
            forward_step_func=forward, data_iterator=iter(parts), model=model, num_microbatches=len(parts),
            seq_length=m["length"], micro_batch_size=micro, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds
