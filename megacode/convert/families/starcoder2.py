"""StarCoder2: LayerNorm and biases everywhere, a plain feed-forward with GELU, grouped queries, rotary on whole heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megacode.convert.family import (
    Context,
    Family,
    common_reasons,
    ends,
    first_reason,
    layer_slots,
    norm_rows,
    refuse,
    rope_keys,
    rotary_base,
    value,
    with_biases,
    within_window,
)
from megacode.convert.layout import QKV, SAME, Slot
from megacode.errors import UserError
from megacode.recipe.schema import Model

_ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _fits(model: Model) -> str | None:
    return first_reason(
        [
            *common_reasons(model),
            (model.normalization != "layernorm", f"model.normalization is {model.normalization}, not layernorm"),
            (
                model.activation not in _ACTIVATIONS,
                f"model.activation is {model.activation}, not one of {', '.join(_ACTIVATIONS)}",
            ),
            (not model.linear_bias, "model.linear_bias is false"),
            (model.rotary_fraction != 1.0, f"model.rotary_fraction is {model.rotary_fraction:g}, not 1"),
            (model.qk_norm, "model.qk_norm normalises queries and keys"),
            (
                model.resolved_head_dim * model.heads != model.hidden_size,
                f"model.head_dim is {model.resolved_head_dim}, not hidden_size / heads",
            ),
        ]
    )


def _config(model: Model, context: Context) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.resolved_ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.resolved_kv_heads,
        "hidden_act": _ACTIVATIONS[model.activation],
        "norm_epsilon": model.norm_epsilon,
        "use_bias": True,
        "sliding_window": None,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
        "residual_dropout": model.dropout,
        "embedding_dropout": model.dropout,
        **rope_keys(model, context),
    }


def _model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse(config, "use_bias", True, "its linear layers have biases")
    activation = config.get("hidden_act") or "gelu_pytorch_tanh"
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if activation not in known:
        raise UserError(
            f"config.json: hidden_act is {activation!r}, and only {', '.join(known)} can be imported exactly"
        )
    heads = int(value(config, "num_attention_heads"))
    return {
        "layers": int(value(config, "num_hidden_layers")),
        "hidden_size": int(value(config, "hidden_size")),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "ffn_size": int(value(config, "intermediate_size")),
        "normalization": "layernorm",
        "norm_epsilon": float(value(config, "norm_epsilon", 1e-5)),
        "activation": known[activation],
        "linear_bias": True,
        "rotary_base": rotary_base(config),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "context_length": within_window(config, int(value(config, "max_position_embeddings", 4096))),
    }


def _slots(model: Model) -> Iterator[Slot]:
    first, last = ends(model, "model.embed_tokens.weight", "model.norm", "lm_head.weight")
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    yield from first
    yield from layer_slots(
        model,
        [
            *norm_rows(model, "self_attention.linear_qkv", "model.layers.{i}.input_layernorm"),
            *with_biases("self_attention.linear_qkv", QKV, tuple(attention + f"{p}_proj" for p in "qkv"), True),
            *with_biases("self_attention.linear_proj", SAME, (attention + "o_proj",), True),
            *norm_rows(model, "mlp.linear_fc1", "model.layers.{i}.post_attention_layernorm"),
            *with_biases("mlp.linear_fc1", SAME, (mlp + "c_fc",), True),
            *with_biases("mlp.linear_fc2", SAME, (mlp + "c_proj",), True),
        ],
    )
    yield from last


STARCODER2 = Family("starcoder2", "Starcoder2ForCausalLM", "starcoder2", _fits, _config, _model_section, _slots)
