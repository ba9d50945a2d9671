"""StarCoder2: LayerNorm and biases everywhere, a plain feed-forward with GELU, grouped queries, rotary on whole heads."""

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
    rope_keys,
    rotary_section,
    value,
    whole_heads,
    within_window,
)
from megacode.convert.layout import QKV, SAME, Slot
from megacode.recipe.schema import Model


def _fits(model: Model) -> str | None:
    return first_reason(
        [
            *common_reasons(model),
            is_not("normalization", model.normalization, "layernorm"),
            is_not("activation", model.activation, *ACTIVATIONS),
            (not model.linear_bias, "model.linear_bias is false"),
            is_not("rotary_fraction", model.rotary_fraction, 1),
            (model.qk_norm, "model.qk_norm normalises queries and keys"),
            own_head_dim(model),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    return {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": ACTIVATIONS[model.activation],
        "norm_epsilon": model.norm_epsilon,
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": model.dropout,
        "embedding_dropout": model.dropout,
        **rope_keys(model, context),
    }


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 2, **config}  # where it is silent, as transformers
    whole_heads(config)
    refuse(config, "use_bias", True, "its linear layers have biases")
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    common = common_section(config)
    return {
        **common,
        "kv_heads": int(config.get("num_key_value_heads") or common["heads"]),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "norm_epsilon", 1e-5)),
        "activation": known_activation(config, "hidden_act", "gelu_pytorch_tanh", known),
        "linear_bias": True,
        **rotary_section(config),
        "dropout": float(config.get("residual_dropout") or 0.0),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "context_length": within_window(
            config, int(value(config, "max_position_embeddings", 4096))
        ),
    }


def _slots(model: Model) -> Iterator[Slot]:
    return decoder_slots(
        model, embedding="model.embed_tokens.weight", norm="model.norm", head="lm_head.weight", layer="model.layers.{i}.",
        norms=("input_layernorm", "post_attention_layernorm"), qkv=(QKV, tuple(f"self_attn.{part}_proj" for part in "qkv")),
        output="self_attn.o_proj",
        fc1=(SAME, ("mlp.c_fc",)), fc2="mlp.c_proj", bias=True,
    )  # fmt: skip


STARCODER2 = Family(
    "starcoder2", "Starcoder2ForCausalLM", "starcoder2", _fits, _config, _model_section, _slots
)
