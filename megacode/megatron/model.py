"""`recipe.model` -> Megatron-Core: layer spec and GPTModel chunks of this rank.

Nothing is re-implemented here: this module chooses between Transformer Engine's layers (CUDA, where
installed) and Megatron-Core's local ones, and builds. The fields are in `config.py`.
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
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megacode.errors import UserError
from megacode.megatron.config import MegatronConfig, megatron_config
from megacode.megatron.initialize import initialize_weights
from megacode.megatron.rotary import set_rotary
from megacode.megatron.workarounds import (
    Attention,
    Gpt,
    Norm,
    accumulate_in_products,
    scale_embedding_and_logits,
)
from megacode.recipe.schema import Recipe

_POSITION_EMBEDDINGS = {"rotary": "rope", "learned": "learned_absolute", "none": "none"}


def block_spec(
    config: TransformerConfig, vp_stage: int | None, engine: bool
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage (and model chunk) and the final norm.

    Args:
        engine: Transformer Engine's, else local ones with `workarounds.Norm`.
    """
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    qk_norm = config.qk_layernorm
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=config.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = Attention
    attention.q_layernorm = attention.k_layernorm = Norm if qk_norm else IdentityOp
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def build_model(
    recipe: Recipe, vocab_size: int, decided: MegatronConfig | None = None
) -> list[GPTModel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), on its device.

    Args:
        decided: by `megatron_config`; here, for one data-parallel rank, if not given.
        vocab_size: of the tokenizer, unpadded. The rows of padding are zero, take no probability
            and get no gradient; nor does the padding of the feed-forward.

    Raises:
        UserError: the environment chooses attention's kernels otherwise than the recipe.
    """
    decided = decided or megatron_config(recipe)
    stages: list[int | None] = list(range(recipe.parallel.virtual_pipeline or 0)) or [None]
    return [_build_chunk(decided, vocab_size, vp_stage) for vp_stage in stages]


def _build_chunk(decided: MegatronConfig, vocab_size: int, vp_stage: int | None) -> GPTModel:
    recipe, config = decided.recipe, decided.transformer
    model = recipe.model
    stored_vocab = model.stored(vocab_size, recipe.parallel.tensor)
    stage: dict[str, Any] = dict(ignore_virtual=False, vp_stage=vp_stage)
    with _attention_in_a_sentence():
        chunk = Gpt(
            config=config,
            transformer_layer_spec=block_spec(
                config, vp_stage, engine=decided.hardware.engine is not None
            ),
            vocab_size=stored_vocab,
            max_sequence_length=model.context_length
            or max(phase.sequence_length for phase in recipe.phases),
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type=_POSITION_EMBEDDINGS[model.position_embedding],
            rotary_percent=model.rotary_fraction,
            vp_stage=vp_stage,
        )
    set_rotary([chunk], model)
    chunk.cuda(torch.cuda.current_device())
    if config.bf16:
        chunk.bfloat16()
    initialize_weights(
        global_parameter_names([chunk]), model, recipe.resolved_model_seed, vocab_size
    )
    scale_embedding_and_logits(chunk, model)
    _mask_padding(chunk, vocab_size, stored_vocab)
    if decided.overlaps["gradient_accumulation"].on:
        accumulate_in_products(chunk)
    return chunk


@contextlib.contextmanager
def _attention_in_a_sentence() -> Iterator[None]:
    """Megatron-Core sets variables of Transformer Engine, and asserts that nobody else has."""
    try:
        yield
    except AssertionError as error:
        if "NVTE_" not in str(error):
            raise
        raise UserError(
            f"the environment has {str(error).split('. ')[0]}; unset NVTE_FLASH_ATTN, "
            "NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN, and choose with "
            "model.megatron.attention_backend (flash, fused, unfused, local or auto)"
        ) from error


def _mask_padding(chunk: GPTModel, vocab_size: int, stored_vocab: int) -> None:
    """Give the logits of padding rows no probability.

    The rows are zero; so the loss is that of the unpadded vocabulary, their gradients are zero, and
    zeros stay zero under weight decay.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    share = stored_vocab // parallel_state.get_tensor_model_parallel_world_size()
    valid = min(max(vocab_size - rank * share, 0), share)
    if valid == share or not chunk.post_process:
        return

    def mask(module: torch.nn.Module, args: Any, output: Any) -> Any:
        # Under autograd this would copy the whole gradient. It may be detached: the gradient of a
        # logit without probability is zero.
        logits = output[0].detach()
        first = valid if logits.shape[-1] == share else vocab_size  # gathered for inference
        logits[..., first:] = torch.finfo(logits.dtype).min / 2
        return output

    chunk.output_layer.register_forward_hook(mask)


def global_parameter_names(model_chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by their names in the whole model.

    Layers are numbered from 0 across pipeline stages.
    """
    names: dict[str, torch.nn.Parameter] = {}
    for chunk in model_chunks:
        layers = {
            path: f"{path.rpartition('.')[0]}.{module.layer_number - 1}"
            for path, module in chunk.named_modules()
            if path.rpartition(".")[2].isdigit() and hasattr(module, "layer_number")
        }
        for path, parameter in chunk.named_parameters():
            layer = next((local for local in layers if path.startswith(local + ".")), "")
            whole = layers[layer] + path[len(layer) :] if layer else path
            names[whole.replace("module.", "")] = parameter
    return names
