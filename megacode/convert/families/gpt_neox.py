"""GPT-NeoX with its attention and feed-forward one after the other: LayerNorm and biases everywhere, rotary on a part of
each head, queries, keys and values in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import (
    ACTIVATIONS,
    Context,
    Family,
    common_keys,
    common_reasons,
    common_section,
    decoder_slots,
    first_reason,
    is_not,
    known_activation,
    own_head_dim,
    refuse,
    rotary_fraction,
    rotary_section,
    scaled_positions,
    shared_heads,
    value,
)
from megacode.convert.layout import QKV_FUSED, SAME, Slot
from megacode.errors import UserError
from megacode.recipe.schema import Model


def _fits(model: Model) -> str | None:
    return first_reason(
        [
            *common_reasons(model),
            is_not("normalization", model.normalization, "layernorm"),
            is_not("activation", model.activation, *ACTIVATIONS),
            (not model.linear_bias, "model.linear_bias is false"),
            shared_heads(model),
            # Before its version 5 transformers read no scaling from where this family keeps the rest of it.
            scaled_positions(model),
            (model.qk_norm, "model.qk_norm normalises queries and keys"),
            own_head_dim(model),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    base = (
        int(model.rotary_base) if model.rotary_base == int(model.rotary_base) else model.rotary_base
    )
    return {
        **common_keys(model),
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": base,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": base, "partial_rotary_factor": model.rotary_fraction,
        },
        "max_position_embeddings": context.length,
        "hidden_dropout": model.dropout,
    }  # fmt: skip


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_parallel_residual", True):
        raise UserError(
            "config.json: use_parallel_residual is true (attention and feed-forward side by side, as in Pythia), which "
            "Megatron-Core's GPT layers do not compute; only models without it can be imported"
        )
    refuse(config, "attention_bias", True, "a recipe has biases on all linear layers or none")
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
        "gelu_new": "gelu-tanh",
        "gelu_fast": "gelu-tanh",
    }
    return {
        **common_section(config),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "layer_norm_eps", 1e-5)),
        "activation": known_activation(config, "hidden_act", "gelu", known),
        "linear_bias": True,
        **rotary_section(config, "rotary_emb_base"),
        "rotary_fraction": rotary_fraction(config, "rotary_pct", 0.25),
        "dropout": float(config.get("hidden_dropout") or 0.0),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "context_length": int(value(config, "max_position_embeddings", 2048)),
    }


def _slots(model: Model) -> Iterator[Slot]:
    return decoder_slots(
        model, embedding="gpt_neox.embed_in.weight", norm="gpt_neox.final_layer_norm", head="embed_out.weight",
        layer="gpt_neox.layers.{i}.", norms=("input_layernorm", "post_attention_layernorm"),
        qkv=(QKV_FUSED, ("attention.query_key_value",)), output="attention.dense",
        fc1=(SAME, ("mlp.dense_h_to_4h",)), fc2="mlp.dense_4h_to_h", bias=True,
    )  # fmt: skip


GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox", _fits, _config, _model_section, _slots
)
