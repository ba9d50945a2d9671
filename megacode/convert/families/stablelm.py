"""StableLM: LayerNorm with biases, SwiGLU, rotary on a part of each head, biases on queries, keys and values or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import (
    Context,
    Family,
    common_keys,
    common_reasons,
    common_section,
    decoder_slots,
    first_reason,
    is_not,
    own_head_dim,
    refuse,
    rope_keys,
    rotary_fraction,
    rotary_section,
    value,
)
from megacode.convert.layout import GATE_UP, QKV, Slot
from megacode.recipe.schema import Model


def _fits(model: Model) -> str | None:
    return first_reason(
        [
            *common_reasons(model),
            is_not("normalization", model.normalization, "layernorm"),
            is_not("activation", model.activation, "swiglu"),
            (model.linear_bias, "model.linear_bias gives biases to every linear layer"),
            (
                model.qk_norm,
                "model.qk_norm normalises queries and keys with weights that all heads share",
            ),
            own_head_dim(model),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    return {
        **common_keys(model),
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": "silu",
        "layer_norm_eps": model.norm_epsilon,
        "use_qkv_bias": model.qkv_bias,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": model.rotary_fraction,
        "hidden_dropout": model.dropout,
        **rope_keys(model, context),
    }


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {"num_key_value_heads": 32, **config}  # where it is silent, as transformers
    refuse(config, "hidden_act", "silu", "the feed-forward is SwiGLU")
    refuse(config, "qk_layernorm", False, "its norms have weights for each head")
    refuse(
        config, "use_parallel_residual", False, "attention and feed-forward run one after the other"
    )
    common = common_section(config)
    return {
        **common,
        "kv_heads": int(config.get("num_key_value_heads") or common["heads"]),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "layer_norm_eps", 1e-5)),
        "activation": "swiglu",
        "qkv_bias": bool(config.get("use_qkv_bias", False)),
        **rotary_section(config),
        "rotary_fraction": rotary_fraction(config, "partial_rotary_factor", 0.25),
        "dropout": float(config.get("hidden_dropout") or 0.0),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "context_length": int(value(config, "max_position_embeddings", 4096)),
    }


def _slots(model: Model) -> Iterator[Slot]:
    return decoder_slots(
        model, embedding="model.embed_tokens.weight", norm="model.norm", head="lm_head.weight", layer="model.layers.{i}.",
        norms=("input_layernorm", "post_attention_layernorm"), qkv=(QKV, tuple(f"self_attn.{part}_proj" for part in "qkv")),
        output="self_attn.o_proj",
        fc1=(GATE_UP, ("mlp.gate_proj", "mlp.up_proj")), fc2="mlp.down_proj", bias=False, qkv_bias=model.qkv_bias,
    )  # fmt: skip


STABLELM = Family(
    "stablelm", "StableLmForCausalLM", "stablelm", _fits, _config, _model_section, _slots
)
