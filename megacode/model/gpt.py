"""`recipe.model` -> Megatron-Core: TransformerConfig, layer spec, GPTModel chunks of this rank.

Nothing is re-implemented here: this module translates names and chooses between Transformer Engine's layers (CUDA, where
installed) and Megatron-Core's local ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megacode.errors import UserError
from megacode.model.initialize import initialize_weights
from megacode.model.mup import apply_scales, scale_fields
from megacode.model.norm import Norm
from megacode.recipe.schema import Recipe

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "squared-relu": lambda x: torch.nn.functional.relu(x).square(),
}


def transformer_engine_available() -> bool:
    """Whether this process can use Transformer Engine's layers: CUDA, and the package imports."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _normal(std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.nn.init.normal_(tensor, mean=0.0, std=std)


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron-Core's configuration for a recipe, on this machine.

    Raises:
        UserError: FP8 or context parallelism without Transformer Engine, or a combination that Megatron-Core refuses (with its
            own words).
    """
    model, parallel, precision = recipe.model, recipe.parallel, recipe.precision
    engine = transformer_engine_available()
    cuda = torch.cuda.is_available()
    if precision.compute == "fp8" and not engine:
        raise UserError(
            "precision: fp8 needs a CUDA device with Transformer Engine, and this machine "
            f"{'has no Transformer Engine' if cuda else 'shows no CUDA device'}; use `precision: bf16` or install it "
            "(`megacode doctor` says how)"
        )
    if parallel.context > 1 and not engine:
        raise UserError(
            f"parallel.context: {parallel.context} needs Transformer Engine's attention on CUDA devices, and this machine "
            f"{'has no Transformer Engine' if cuda else 'shows no CUDA device'}; set it to 1 (parallel.tensor or "
            "parallel.pipeline split a model too) or install it (`megacode doctor` says how)"
        )
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
        # For what `initialize_weights` does not know; it draws the rest anew.
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
        # Sum of losses over micro-batches and ranks, divided once by the number of tokens: independent of the layout.
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        # gloo matches the messages of a pair of ranks in order, so a batched exchange in both directions mixes them up.
        batch_p2p_comm=cuda,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=cuda,
        bias_activation_fusion=cuda and model.activation == "swiglu",  # the fused GELU is the approximate one
        apply_rope_fusion=engine and model.position_embedding == "rotary",
        cross_entropy_loss_fusion=engine,
        cross_entropy_fusion_impl="te" if engine else "native",
        gradient_accumulation_fusion=cuda and tensor_parallel_layers._grad_accum_fusion_available,
    )
    fields |= scale_fields(model)
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
    try:
        return TransformerConfig(**(fields | dict(model.megatron)))
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"model: Megatron-Core refuses this configuration: {error}; change the keys it names"
        ) from error


def _with_own_norm(layer: ModuleSpec, qk_norm: bool) -> ModuleSpec:
    """The local layer spec with the norm that also knows sequence parallelism."""
    parts = layer.submodules
    parts.input_layernorm = Norm
    parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = Norm if qk_norm else IdentityOp
    return layer


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage (and model chunk) and the final norm."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if transformer_engine_available():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    return TransformerBlockSubmodules(layer_specs=[_with_own_norm(layer, config.qk_layernorm)] * count, layer_norm=Norm)


def build_model(recipe: Recipe, vocab_size: int, config: TransformerConfig | None = None) -> list[GPTModel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), on its device, in the recipe's precision.

    Args:
        vocab_size: of the tokenizer, unpadded. The rows of padding are zero, take no probability and get no gradient; nor
            does the padding of the feed-forward.
    """
    model = recipe.model
    config = config or transformer_config(recipe)
    length = model.context_length or max(phase.sequence_length for phase in recipe.phases)
    padded = model.stored(vocab_size, recipe.parallel.tensor)
    stages: list[int | None] = list(range(recipe.parallel.virtual_pipeline or 0)) or [None]
    chunks = []
    for vp_stage in stages:
        with _fp8_parameters(recipe):
            chunk = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(config, vp_stage),
                vocab_size=padded,
                max_sequence_length=length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                parallel_output=True,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type={"rotary": "rope", "learned": "learned_absolute", "none": "none"}[
                    model.position_embedding
                ],
                rotary_percent=model.rotary_fraction,
                rotary_base=int(model.rotary_base)
                if model.rotary_base == int(model.rotary_base)
                else model.rotary_base,
                vp_stage=vp_stage,
            )
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        if config.bf16:
            chunk.bfloat16()
        names = global_parameter_names([chunk])
        initialize_weights(names, model, recipe.seed, vocab_size, config.ffn_hidden_size, padded)
        apply_scales(chunk, model)
        _mask_padding(chunk, vocab_size, padded)
        chunks.append(chunk)
    return chunks


@contextlib.contextmanager
def _fp8_parameters(recipe: Recipe) -> Iterator[None]:
    if recipe.precision.compute == "fp8" and recipe.precision.fp8_params:
        from transformer_engine.pytorch import fp8_model_init

        with fp8_model_init(enabled=True, preserve_high_precision_init_val=True):
            yield
    else:
        yield


def _mask_padding(chunk: GPTModel, vocab_size: int, padded: int) -> None:
    """Give the logits of padding rows no probability.

    The rows are zero; so the loss is that of the unpadded vocabulary, their gradients are zero, and zeros stay zero under
    weight decay.
    """
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    share = padded // size
    valid = min(max(vocab_size - rank * share, 0), share)
    if valid == share or not chunk.post_process:
        return

    def mask(module: torch.nn.Module, args: Any, output: Any) -> Any:
        # Behind autograd's back, which would copy the whole gradient: that of a logit without probability is zero.
        logits = output[0].detach()
        logits[..., valid:] = torch.finfo(logits.dtype).min / 2
        return output

    chunk.output_layer.register_forward_hook(mask)


def global_parameter_names(chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by their names in the whole model: layers numbered from 0 across pipeline stages."""
    names: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        offsets = {}
        for path, module in chunk.named_modules():
            number = getattr(module, "layer_number", None)
            if number is not None and path.rsplit(".", 1)[-1].isdigit():
                offsets[path] = path.rsplit(".", 1)[0] + f".{number - 1}"
        for path, parameter in chunk.named_parameters():
            prefix = next((local for local in offsets if path.startswith(local + ".")), "")
            whole = offsets[prefix] + path[len(prefix) :] if prefix else path
            names[whole.replace("module.", "")] = parameter
    return names
