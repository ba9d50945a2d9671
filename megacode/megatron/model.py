"""`recipe.model` -> Megatron-Core: layer spec and GPTModel chunks of this rank.

Nothing is re-implemented here: this module chooses between Transformer Engine's layers (CUDA, where installed) and
Megatron-Core's local ones, and builds. What Megatron-Core is handed is in `config.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megacode.errors import UserError
from megacode.megatron.config import MegatronConfig, megatron_config
from megacode.megatron.initialize import initialize_weights
from megacode.megatron.loss import Gpt
from megacode.megatron.mup import apply_scales
from megacode.megatron.norm import Norm
from megacode.recipe.schema import Model, Recipe


def _with_own_norm(layer: ModuleSpec, qk_norm: bool) -> ModuleSpec:
    """The local layer spec with the norm that also knows sequence parallelism."""
    parts = layer.submodules
    parts.input_layernorm = Norm
    parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = Norm if qk_norm else IdentityOp
    return layer


def block_spec(
    config: TransformerConfig, vp_stage: int | None, engine: bool
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage (and model chunk) and the final norm; of Transformer Engine or local."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    return TransformerBlockSubmodules(
        layer_specs=[_with_own_norm(layer, config.qk_layernorm)] * count, layer_norm=Norm
    )


def build_model(
    recipe: Recipe, vocab_size: int, decided: MegatronConfig | None = None
) -> list[GPTModel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), on its device, in the recipe's precision.

    Args:
        decided: by `megatron_config`; here, for one data-parallel rank, if not given.
        vocab_size: of the tokenizer, unpadded. The rows of padding are zero, take no probability and get no gradient; nor
            does the padding of the feed-forward.

    Raises:
        UserError: the environment chooses attention's kernels otherwise than the recipe.
    """
    model = recipe.model
    decided = decided or megatron_config(recipe)
    config = decided.transformer
    length = model.context_length or max(phase.sequence_length for phase in recipe.phases)
    padded = model.stored(vocab_size, recipe.parallel.tensor)
    stages: list[int | None] = list(range(recipe.parallel.virtual_pipeline or 0)) or [None]
    model_chunks = []
    for vp_stage in stages:
        with _attention_in_a_sentence():
            chunk = Gpt(
                config=config,
                transformer_layer_spec=block_spec(
                    config, vp_stage, engine=decided.hardware.engine is not None
                ),
                vocab_size=padded,
                max_sequence_length=length,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                parallel_output=True,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type={
                    "rotary": "rope",
                    "learned": "learned_absolute",
                    "none": "none",
                }[model.position_embedding],
                rotary_percent=model.rotary_fraction,
                rotary_base=int(model.rotary_base)
                if model.rotary_base == int(model.rotary_base)
                else model.rotary_base,
                **_rotary_scaling(model),
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
        if decided.overlaps["gradient_accumulation"].on:
            _accumulate_in_products(chunk)
        model_chunks.append(chunk)
    return model_chunks


@contextlib.contextmanager
def _attention_in_a_sentence() -> Iterator[None]:
    """Megatron-Core sets Transformer Engine's variables by `attention_backend`, and asserts that nobody else has."""
    try:
        yield
    except AssertionError as error:
        if "NVTE_" not in str(error):
            raise
        raise UserError(
            f"the environment has {str(error).split('. ')[0]}; unset NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN, and "
            "choose with model.megatron.attention_backend (flash, fused, unfused, local or auto)"
        ) from error


def _rotary_scaling(model: Model) -> dict[str, Any]:
    """GPTModel's arguments."""
    scaling = model.rotary_scaling
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"seq_len_interpolation_factor": scaling.factor}
    return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}


def _accumulate_in_products(chunk: GPTModel) -> None:
    """Let Transformer Engine's layers add weight gradients to `main_grad` in the matrix product that makes them.

    Megatron-Core's own key turns this on for all layers or none, and its output layer refuses without Apex; these layers
    bring a kernel of their own.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _mask_padding(chunk: GPTModel, vocab_size: int, padded: int) -> None:
    """Give the logits of padding rows no probability.

    The rows are zero; so the loss is that of the unpadded vocabulary, their gradients are zero, and zeros stay zero under
    weight decay.
    """
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
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


def global_parameter_names(model_chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by their names in the whole model: layers numbered from 0 across pipeline stages."""
    names: dict[str, torch.nn.Parameter] = {}
    for chunk in model_chunks:
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
